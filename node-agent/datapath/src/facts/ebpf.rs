//! Programs on the proxy's device that may carry packets past netfilter, where our rules are. Pure.

use super::obstacle::{EbpfOwner, Obstacle};

/// Start of the names of devices that Cilium's own CNI plugin makes; chained behind another one, it
/// takes that one's devices and leaves packets to the host's stack.
const CILIUM_DEVICE: &str = "lxc";

/// Start of the names of Calico's programs.
const CALICO_PROGRAM: &str = "cali_";

/// Start of the names of Cilium's programs.
const CILIUM_PROGRAMS: [&str; 2] = ["cil_", "bpf_lxc"];

/// What the programs of the proxy's device mean. `cilium`: its agent runs on this host.
pub(super) fn judge(cilium: bool, device: &str, programs: &[String]) -> Option<Obstacle> {
    let ours = device.to_owned();
    if cilium && device.starts_with(CILIUM_DEVICE) {
        return Some(Obstacle::Ebpf(EbpfOwner::Cilium, ours));
    }
    if programs.iter().any(|name| name.starts_with(CALICO_PROGRAM)) {
        return Some(Obstacle::Ebpf(EbpfOwner::Calico, ours));
    }
    let chained =
        |name: &String| cilium && CILIUM_PROGRAMS.iter().any(|start| name.starts_with(start));
    let stranger = programs.iter().find(|name| !chained(name))?;
    let name = if stranger.is_empty() {
        "without a name"
    } else {
        stranger
    };
    Some(Obstacle::EbpfProgram {
        device: ours,
        program: name.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(cilium: bool, device: &str, program: &str) -> Option<Obstacle> {
        judge(cilium, device, &[program.to_owned()])
    }

    #[test]
    fn a_device_of_ciliums_own_is_past_netfilter() {
        // Attached by tcx, its programs are in no list of tc.
        assert_eq!(
            judge(true, "lxc0a1b2c3d4e5f", &[]),
            Some(Obstacle::Ebpf(
                EbpfOwner::Cilium,
                "lxc0a1b2c3d4e5f".to_owned()
            ))
        );
        assert_eq!(judge(false, "lxcbr0", &[]), None, "LXC is no Cilium");
    }

    #[test]
    fn cilium_behind_another_plugin_is_none_of_our_business() {
        assert_eq!(
            judged(true, "veth1234", "cil_from_container-veth1234"),
            None
        );
        assert_eq!(judge(true, "veth1234", &[]), None);
    }

    #[test]
    fn calicos_program_is_past_netfilter() {
        assert_eq!(
            judged(false, "cali0123456789a", "cali_tc_preamble"),
            Some(Obstacle::Ebpf(
                EbpfOwner::Calico,
                "cali0123456789a".to_owned()
            ))
        );
    }

    #[test]
    fn the_program_of_somebody_unknown_is_named() {
        let found = judged(false, "veth1", "watch_packets").unwrap();
        assert!(found.to_string().contains("watch_packets"), "{found}");
        let nameless = judged(false, "veth1", "").unwrap();
        assert!(
            nameless.to_string().contains("without a name"),
            "{nameless}"
        );
    }
}
