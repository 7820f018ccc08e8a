//! Many pods on a host, as far as the host sees them.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use super::Bed;

/// Address of a pod of the crowd.
pub(crate) fn ip(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, 2, number)
}

impl Bed {
    /// Gives the host a device and a route for each of so many pods; their other ends share a
    /// namespace.
    pub(crate) fn crowd(&mut self, pods: u8) {
        let others = self.add("crowd");
        let mut batch = String::new();
        for number in 0..pods {
            // Writing to a String cannot fail.
            let _ = writeln!(
                batch,
                "link add crowd{number} type veth peer name eth{number} netns {others}\n\
                 link set crowd{number} up\n\
                 route add {}/32 dev crowd{number}",
                ip(number)
            );
        }
        self.run("host", &format!("ip -batch - <<END\n{batch}END\n"));
    }
}
