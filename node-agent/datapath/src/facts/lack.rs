//! What the kernel or this process lacks, as the kernel's or a program's error tells it. Pure.

use std::io;

use nix::libc;

use crate::datapath::{Item, Link};
use crate::kernel::KernelError;
use crate::kernel::ip_set::IpSetError;
use crate::kernel::iptables::IptablesError;
use crate::kernel::netlink::NetlinkError;
use crate::kernel::sysctl::SysctlError;

/// What is lacking.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lack {
    /// A right.
    #[error(
        "the kernel does not permit it to the agent: give its container NET_ADMIN, NET_RAW and SYS_ADMIN \
         (config/node-agent does)"
    )]
    Right,
    /// A part of the kernel.
    #[error("this kernel lacks {what}: load it on the node (modprobe -a {modules})")]
    Module {
        /// What it is, in words.
        what: String,
        /// The modules that have it.
        modules: String,
    },
    /// `/proc/sys/net` can be read only.
    #[error("the agent cannot write settings")]
    WritableSettings,
    /// The UDP port of geneve.
    #[error(
        "the UDP port of geneve is in use by another device or program: set spec.tunnel.port to a free port"
    )]
    GenevePort,
}

/// What the error of a step is about, if it is about something lacking. `item`: what was being changed,
/// none where something was read.
#[must_use]
pub fn of_kernel(error: &KernelError, item: Option<&Item>) -> Option<Lack> {
    match error {
        KernelError::Enter(_, error) => denied(error).then_some(Lack::Right),
        KernelError::Netlink(error) => of_netlink(error, item),
        KernelError::Iptables(error) => of_iptables(error),
        KernelError::IpSet(error) => of_ip_set(error),
        KernelError::Sysctl(SysctlError::Write(_, error)) => {
            let read_only = error.kind() == io::ErrorKind::ReadOnlyFilesystem;
            (read_only || denied(error)).then_some(Lack::WritableSettings)
        }
        KernelError::Sysctl(_) | KernelError::Detached => None,
    }
}

/// As [`of_kernel`], of netlink alone.
#[must_use]
pub fn of_netlink(error: &NetlinkError, item: Option<&Item>) -> Option<Lack> {
    let (NetlinkError::Read(_, cause) | NetlinkError::Change(_, cause)) = error else {
        return None;
    };
    let rtnetlink::Error::NetlinkError(answer) = cause else {
        return None;
    };
    match (-answer.raw_code(), item) {
        // The geneve driver's own word for a port that another device has (rights are looked at first).
        (libc::EPERM | libc::EBUSY, Some(Item::Link(Link::Geneve { .. }))) => {
            Some(Lack::GenevePort)
        }
        (libc::EADDRINUSE, Some(Item::Up(_))) => Some(Lack::GenevePort),
        (libc::EPERM | libc::EACCES, _) => Some(Lack::Right),
        _ => None,
    }
}

/// As [`of_kernel`], of iptables alone.
#[must_use]
pub fn of_iptables(error: &IptablesError) -> Option<Lack> {
    let IptablesError::Failed {
        program,
        table,
        message,
    } = error
    else {
        return None;
    };
    if message.contains("you must be root") || message.contains("Operation not permitted") {
        return Some(Lack::Right);
    }
    // Both backends warn so of a match or target before they fail.
    let extension = message
        .split_once("Warning: Extension ")
        .and_then(|(_, rest)| rest.split(' ').next())
        .filter(|_| message.contains("missing kernel module"));
    let missing = |what: String, modules: String| Some(Lack::Module { what, modules });
    if let Some(extension) = extension {
        return missing(
            format!("the extension {extension} of iptables"),
            modules_of(extension, program),
        );
    }
    if message.contains("initialize nft") || message.contains("generation id") {
        return missing("nf_tables".to_owned(), "nf_tables".to_owned());
    }
    if message.contains("initialize") || message.contains("do you need to insmod") {
        return missing(
            "a table of iptables-legacy".to_owned(),
            format!("ip_tables iptable_{table}"),
        );
    }
    None
}

/// Whether iptables lacks a part of the kernel.
pub(super) fn is_of_kernel(error: &IptablesError) -> bool {
    matches!(of_iptables(error), Some(Lack::Module { .. }))
}

/// The modules of a match or target. Without the second, the nft programs know no extension at all.
fn modules_of(extension: &str, program: &str) -> String {
    let module = match extension {
        "tcp" | "udp" => "xt_tcpudp".to_owned(),
        "MARK" => "xt_mark".to_owned(),
        "CONNMARK" => "xt_connmark".to_owned(),
        _ => format!("xt_{extension}"),
    };
    if program.contains("-nft-") {
        module + " nft_compat"
    } else {
        module
    }
}

fn of_ip_set(error: &IpSetError) -> Option<Lack> {
    // The second is what nfnetlink says to what it does not know.
    const ABSENT: [&str; 2] = ["not supported", "error received: Invalid argument"];
    let module = || Lack::Module {
        what: "sets of addresses".to_owned(),
        modules: "ip_set ip_set_hash_ip".to_owned(),
    };
    match error {
        IpSetError::Enter(error) => denied(error).then_some(Lack::Right),
        IpSetError::List(_, error) if denied(error) => Some(Lack::Right),
        // netfilter's word for a part of it that is not there.
        IpSetError::List(_, error) => (error.raw_os_error() == Some(libc::EINVAL)).then(module),
        IpSetError::Library { message, .. } if message.contains("not permitted") => {
            Some(Lack::Right)
        }
        IpSetError::Library { message, .. } if ABSENT.iter().any(|part| message.contains(part)) => {
            Some(module())
        }
        IpSetError::Library { .. } | IpSetError::Full { .. } => None,
    }
}

fn denied(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::PermissionDenied
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn of_message(program: &'static str, message: &str) -> Option<Lack> {
        let error = IptablesError::Failed {
            program,
            table: "mangle",
            message: message.to_owned(),
        };
        of_kernel(&error.into(), None)
    }

    fn modules(lack: Option<Lack>) -> String {
        match lack {
            Some(Lack::Module { modules, .. }) => modules,
            other => panic!("{other:?}"),
        }
    }

    const NFT: &str = "iptables-nft-restore";
    const LEGACY: &str = "iptables-legacy-restore";

    // As iptables 1.8.9 and ipset 7.17 print it on Linux 6.1 from which the modules were taken.

    #[test]
    fn an_extension_that_the_kernel_lacks_is_named_with_its_module() {
        let nft = "Warning: Extension TPROXY revision 0 not supported, missing kernel module?
iptables-nft-restore v1.8.9 (nf_tables): 
line 3: RULE_APPEND failed (No such file or directory): rule in chain t";
        assert_eq!(modules(of_message(NFT, nft)), "xt_TPROXY nft_compat");
        let legacy = "Warning: Extension set revision 0 not supported, missing kernel module?
iptables-restore v1.8.9 (legacy): Kernel module xt_set is not loaded in.";
        let lack = of_message(LEGACY, legacy);
        assert!(
            lack.as_ref()
                .unwrap()
                .to_string()
                .contains("the extension set of iptables"),
            "{lack:?}"
        );
        assert_eq!(modules(lack), "xt_set");
    }

    #[test]
    fn a_missing_right_is_told_from_a_missing_module() {
        for message in [
            "iptables-nft-save v1.8.9 (nf_tables): Could not fetch rule set generation id: Permission denied (you must be root)",
            "iptables-save v1.8.9 (legacy): Cannot initialize: Permission denied (you must be root)",
        ] {
            assert_eq!(of_message(NFT, message), Some(Lack::Right));
        }
        let nft = "iptables-nft-save v1.8.9 (nf_tables): Could not fetch rule set generation id: Invalid argument";
        assert_eq!(modules(of_message(NFT, nft)), "nf_tables");
        for legacy in [
            "iptables-restore v1.8.9 (legacy): iptables-restore: unable to initialize table 'mangle'",
            "iptables-save v1.8.9 (legacy): Cannot initialize: Table does not exist (do you need to insmod?)",
        ] {
            assert_eq!(
                modules(of_message(LEGACY, legacy)),
                "ip_tables iptable_mangle"
            );
        }
        assert_eq!(of_message(LEGACY, "iptables-restore: line 4 failed"), None);
    }

    #[test]
    fn a_set_that_the_kernel_lacks_or_forbids_is_told() {
        let of = |message: &str| {
            let error = IpSetError::Library {
                set: "ztunnel-pods-ips".to_owned(),
                action: "create",
                message: message.to_owned(),
            };
            of_kernel(&error.into(), None)
        };
        assert_eq!(
            of("Kernel error received: Operation not permitted"),
            Some(Lack::Right)
        );
        for message in [
            "Kernel error received: Invalid argument",
            "Kernel error received: set type not supported",
        ] {
            assert_eq!(modules(of(message)), "ip_set ip_set_hash_ip");
        }
        assert_eq!(of("Element cannot be added to the set"), None);
    }

    #[test]
    fn settings_that_can_be_read_only_are_told() {
        let of = |errno| {
            let error = io::Error::from_raw_os_error(errno);
            of_kernel(&SysctlError::Write(PathBuf::new(), error).into(), None)
        };
        assert_eq!(of(libc::EROFS), Some(Lack::WritableSettings));
        assert_eq!(of(libc::EACCES), Some(Lack::WritableSettings));
        assert_eq!(of(libc::EINVAL), None);
    }
}
