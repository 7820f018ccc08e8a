//! Addresses of the family that a test's namespace has.

use std::cell::Cell;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What a namespace has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Families {
    V4,
    V6,
    Both,
}

thread_local! {
    /// A test's thread is in a namespace of its own, so this is known where the namespace is.
    static HERE: Cell<Families> = const { Cell::new(Families::Both) };
}

impl Families {
    /// From now on this thread has these.
    pub(crate) fn choose(self) {
        HERE.set(self);
    }

    fn has(self, ip: &IpAddr) -> bool {
        match self {
            Self::V4 => ip.is_ipv4(),
            Self::V6 => ip.is_ipv6(),
            Self::Both => true,
        }
    }

    /// What redirects to a proxy, and the address it listens on.
    pub(crate) fn tproxy(self) -> Vec<(&'static str, IpAddr)> {
        let all = [
            ("iptables", Ipv4Addr::LOCALHOST.into()),
            ("ip6tables", Ipv6Addr::LOCALHOST.into()),
        ];
        all.into_iter().filter(|(_, ip)| self.has(ip)).collect()
    }
}

/// A host, by its address of each family.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Host {
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Ipv6Addr,
}

impl Host {
    pub(crate) const fn new(net: u8, number: u8) -> Self {
        Self {
            v4: Ipv4Addr::new(10, net, 0, number),
            v6: Ipv6Addr::new(0xfd00, net as u16, 0, 0, 0, 0, 0, number as u16),
        }
    }

    /// Those that it has here.
    pub(crate) fn addresses(self) -> Vec<IpAddr> {
        let all = [IpAddr::from(self.v4), IpAddr::from(self.v6)];
        let here = HERE.get();
        all.into_iter().filter(|ip| here.has(ip)).collect()
    }
}

/// The one that it has here.
impl From<Host> for IpAddr {
    fn from(host: Host) -> Self {
        match host.addresses().as_slice() {
            [only] => *only,
            several => panic!("which of {several:?} is meant?"),
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        IpAddr::from(*self).fmt(f)
    }
}
