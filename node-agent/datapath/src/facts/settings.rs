//! Settings of the host that are somebody else's to make, and that the data path cannot do without.

use std::path::Path;

use super::FactsError;
use super::obstacle::Obstacle;
use crate::family::Family;
use crate::kernel::sysctl::{self, SysctlError};
use crate::names;
use crate::netns::Netns;

/// The setting that keeps the host from forwarding what pods and proxy send.
pub(super) fn forwarding(
    host: &Netns,
    root: &Path,
    device: Option<&str>,
    ipv6: bool,
) -> Result<Option<Obstacle>, FactsError> {
    let needed = needed(device, ipv6);
    let off = host
        .run(|| -> Result<_, SysctlError> {
            for path in needed {
                if sysctl::read(&root.join(&path))?.as_deref() == Some("0") {
                    return Ok(Some(path));
                }
            }
            Ok(None)
        })
        .map_err(FactsError::Enter)??;
    Ok(off.map(Obstacle::ForwardingDisabled))
}

/// `ip_forward` sets that of every device, each of which can be changed alone.
fn needed(device: Option<&str>, ipv6: bool) -> Vec<String> {
    let mut paths = vec![names::forwarding(Family::V4).to_owned()];
    paths.extend(device.map(|device| format!("ipv4/conf/{device}/forwarding")));
    if ipv6 {
        paths.push(names::forwarding(Family::V6).to_owned());
    }
    paths
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_setting_that_is_off_is_named() {
        let root = std::env::temp_dir().join(format!("ambit-settings-{}", std::process::id()));
        let write = |path: &str, value: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, value).unwrap();
        };
        let off = |device, ipv6| forwarding(&Netns::own(), &root, device, ipv6).unwrap();
        write("ipv4/ip_forward", "1\n");
        write("ipv4/conf/vethp/forwarding", "0\n");
        write("ipv6/conf/all/forwarding", "0\n");
        assert_eq!(off(None, false), None);
        assert_eq!(
            off(Some("vethp"), true),
            Some(Obstacle::ForwardingDisabled(
                "ipv4/conf/vethp/forwarding".to_owned()
            ))
        );
        assert_eq!(
            off(Some("vanished"), true),
            Some(Obstacle::ForwardingDisabled(
                "ipv6/conf/all/forwarding".to_owned()
            ))
        );
        write("ipv4/ip_forward", "0\n");
        assert_eq!(
            off(None, false),
            Some(Obstacle::ForwardingDisabled("ipv4/ip_forward".to_owned()))
        );
        fs::remove_dir_all(&root).unwrap();
    }
}
