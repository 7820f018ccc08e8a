//! What went wrong in a pass, as a condition says it. Pure.

use std::error::Error;

use crds::reasons;
use datapath::Item;
use datapath::attachment::AttachError;
use datapath::facts::lack::{self, Lack};
use datapath::facts::{FactsError, Obstacle, Severity};
use datapath::kernel::ip_set::IpSetError;
use datapath::kernel::iptables::IptablesError;
use datapath::kernel::netlink::NetlinkError;
use datapath::kernel::{ApplyError, KernelError};
use datapath::plan::Plan;

/// The part of the data path that a failure is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// The devices.
    Tunnels,
    /// Everything else.
    Redirection,
    /// The kernel cannot be read, so nothing is known of any part.
    All,
}

/// Why the kernel does not hold what it should, or why that does not help.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) part: Part,
    /// One of [`reasons`].
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

/// Something else that a person should look at: a proxy of no use, or what may keep one from working.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Complaint {
    /// One of [`reasons`].
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

impl Failure {
    fn redirection(reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            part: Part::Redirection,
            reason,
            message: message.into(),
        }
    }

    /// The kernel has no geneve driver, so nothing is begun.
    pub(crate) fn geneve_unsupported() -> Self {
        Self {
            part: Part::Tunnels,
            reason: reasons::GENEVE_UNSUPPORTED,
            message: NetlinkError::GeneveUnsupported.to_string(),
        }
    }

    /// The files between the agent and the plugin that holds new pods back.
    pub(crate) fn plugin(error: &dyn Error) -> Self {
        Self::redirection(reasons::NEW_PODS_NOT_HELD, chain(error))
    }

    /// What is in the way and so bad; all of it in words, by the reason of the first.
    pub(crate) fn obstacles(obstacles: &[Obstacle], severity: Severity) -> Option<Self> {
        let found: Vec<&Obstacle> = obstacles
            .iter()
            .filter(|obstacle| obstacle.severity() == severity)
            .collect();
        let first = found.first()?;
        let messages: Vec<String> = found.iter().map(ToString::to_string).collect();
        Some(Self {
            part: match first {
                Obstacle::GenevePort { .. } => Part::Tunnels,
                _ => Part::Redirection,
            },
            reason: reason_of_obstacle(first),
            message: messages.join("; "),
        })
    }

    /// A second plan against what was just applied is not empty.
    pub(crate) fn not_converged(left: &Plan) -> Self {
        let first = left.steps.first().map(ToString::to_string);
        Self::redirection(
            reasons::NOT_CONVERGED,
            format!(
                "{} changes are still to be made after all were made; somebody else undoes them; the first: {}",
                left.steps.len(),
                first.unwrap_or_default()
            ),
        )
    }
}

impl Complaint {
    /// Why a proxy's namespace cannot be redirected to.
    pub(crate) fn unusable(error: &AttachError) -> Self {
        let lack = match error {
            AttachError::Kernel(error) => lack::of_kernel(error, None),
            _ => None,
        };
        let otherwise = match error {
            AttachError::NotVeth { .. } => reasons::PROXY_WITHOUT_VETH,
            AttachError::Netkit(_) => reasons::EBPF_DATA_PATH,
            _ => reasons::PROXY_UNUSABLE,
        };
        let (reason, message) = told(lack, error, otherwise);
        Self { reason, message }
    }

    /// What might be in the way.
    pub(crate) fn of(obstacles: &[Obstacle]) -> Option<Self> {
        let found = Failure::obstacles(obstacles, Severity::MayBreak)?;
        Some(Self {
            reason: found.reason,
            message: found.message,
        })
    }
}

fn reason_of_obstacle(obstacle: &Obstacle) -> &'static str {
    match obstacle {
        Obstacle::GenevePort { .. } => reasons::GENEVE_PORT_IN_USE,
        Obstacle::RuleMark(_) | Obstacle::ChainMark { .. } => reasons::MARKS_CONFLICT,
        Obstacle::BackendChanged(_) => reasons::IPTABLES_BACKEND_CHANGED,
        Obstacle::Ipvs => reasons::IPVS_UNSUPPORTED,
        Obstacle::ForwardingDisabled(_) => reasons::FORWARDING_DISABLED,
        Obstacle::SourceCheck { .. } => reasons::SOURCE_CHECK,
        Obstacle::Ebpf(..) | Obstacle::EbpfProgram { .. } => reasons::EBPF_DATA_PATH,
    }
}

fn reason_of_lack(lack: &Lack) -> &'static str {
    match lack {
        Lack::Right => reasons::CAPABILITY_MISSING,
        Lack::Module { .. } => reasons::KERNEL_MODULE_MISSING,
        Lack::WritableSettings => reasons::SYSCTL_READ_ONLY,
        Lack::GenevePort => reasons::GENEVE_PORT_IN_USE,
    }
}

/// Reason and message of an error: what is lacking if something is, else `otherwise`.
fn told(lack: Option<Lack>, error: &dyn Error, otherwise: &'static str) -> (&'static str, String) {
    match lack {
        Some(lack) => (reason_of_lack(&lack), format!("{lack} ({})", chain(error))),
        None => (otherwise, chain(error)),
    }
}

impl From<&FactsError> for Failure {
    fn from(error: &FactsError) -> Self {
        let lack = match error {
            FactsError::Netlink(error) => lack::of_netlink(error, None),
            FactsError::Iptables(error) => lack::of_iptables(error),
            _ => None,
        };
        let otherwise = match error {
            FactsError::Rights(_) => reasons::CAPABILITY_MISSING,
            FactsError::Iptables(IptablesError::Missing(_)) => reasons::IPTABLES_MISSING,
            _ => reasons::OBSERVE_FAILED,
        };
        let (reason, message) = told(lack, error, otherwise);
        Self {
            part: Part::All,
            reason,
            message,
        }
    }
}

impl From<&KernelError> for Failure {
    fn from(error: &KernelError) -> Self {
        let otherwise = match error {
            KernelError::Iptables(IptablesError::Missing(_)) => reasons::IPTABLES_MISSING,
            _ => reasons::OBSERVE_FAILED,
        };
        let (reason, message) = told(lack::of_kernel(error, None), error, otherwise);
        Self {
            part: Part::All,
            reason,
            message,
        }
    }
}

impl From<&ApplyError> for Failure {
    fn from(error: &ApplyError) -> Self {
        let item = error.step.change.item();
        let part = match item {
            Item::Link(_) | Item::Up(_) | Item::Address(_) => Part::Tunnels,
            _ => Part::Redirection,
        };
        let named = match &error.cause {
            KernelError::Netlink(NetlinkError::GeneveUnsupported) => reasons::GENEVE_UNSUPPORTED,
            KernelError::Netlink(NetlinkError::ForeignDevice(_)) => reasons::FOREIGN_DEVICE,
            KernelError::Iptables(IptablesError::Missing(_)) => reasons::IPTABLES_MISSING,
            KernelError::IpSet(IpSetError::Full(_)) => reasons::SET_FULL,
            cause => {
                let lack = lack::of_kernel(cause, Some(item));
                let (reason, message) = told(lack, error, reasons::APPLY_FAILED);
                return Self {
                    part,
                    reason,
                    message,
                };
            }
        };
        Self {
            part,
            reason: named,
            // These say themselves what they are about and what to do.
            message: chain(&error.cause),
        }
    }
}

/// An error with its causes, on one line.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

/// The innermost cause of an error. Those of kube repeat it at every layer.
pub(crate) fn root(error: &dyn Error) -> String {
    let mut innermost = error;
    while let Some(cause) = innermost.source() {
        innermost = cause;
    }
    innermost.to_string()
}

#[cfg(test)]
mod tests {
    use datapath::datapath::Member;
    use datapath::names::Names;
    use datapath::plan::{Change, Step};
    use datapath::set::Role;
    use datapath::{Family, Place};

    use super::*;

    fn apply_error(item: Item, cause: KernelError) -> Failure {
        Failure::from(&ApplyError {
            step: Box::new(Step {
                place: Place::Host,
                change: Change::Add(item),
            }),
            cause,
        })
    }

    #[test]
    fn a_missing_iptables_is_named() {
        let failure = apply_error(
            Item::Set(Names::default().set(Role::Redirect, Family::V4)),
            IptablesError::Missing("iptables-nft-restore").into(),
        );
        assert_eq!(failure.reason, reasons::IPTABLES_MISSING);
        assert!(
            failure.message.contains("iptables-nft-restore is missing"),
            "{}",
            failure.message
        );
    }

    #[test]
    fn a_full_set_is_named_with_the_address_that_did_not_fit() {
        let member = Member {
            set: Names::default().set(Role::Redirect, Family::V4),
            ip: "10.0.0.4".parse().unwrap(),
        };
        let full = IpSetError::Full(member.clone());
        let failure = apply_error(Item::Member(member), full.into());
        assert_eq!(
            (failure.part, failure.reason),
            (Part::Redirection, reasons::SET_FULL)
        );
        assert!(failure.message.contains("10.0.0.4"), "{}", failure.message);
    }

    #[test]
    fn a_step_that_the_kernel_refused_is_named_with_the_cause() {
        let failure = apply_error(
            Item::Up("istioin".to_owned()),
            NetlinkError::NoDevice("istioin".to_owned()).into(),
        );
        assert_eq!(
            (failure.part, failure.reason),
            (Part::Tunnels, reasons::APPLY_FAILED)
        );
        assert_eq!(
            failure.message,
            "host  + ip link set istioin up: there is no device istioin"
        );
    }

    #[test]
    fn what_is_in_the_way_is_told_by_how_bad_it_is() {
        let marks = Obstacle::RuleMark(0x100);
        let forwarding = Obstacle::ForwardingDisabled("ipv4/ip_forward".to_owned());
        let found = [forwarding, marks, Obstacle::Ipvs];
        let forbids = Failure::obstacles(&found, Severity::Forbids).unwrap();
        assert_eq!(forbids.reason, reasons::MARKS_CONFLICT);
        assert!(forbids.message.contains("0x100"), "{}", forbids.message);
        let breaks = Failure::obstacles(&found, Severity::Breaks).unwrap();
        assert_eq!(breaks.reason, reasons::FORWARDING_DISABLED);
        assert!(
            breaks.message.contains("ip_forward") && breaks.message.contains("IPVS"),
            "all that is wrong is said: {}",
            breaks.message
        );
        assert_eq!(Complaint::of(&found), None);
    }

    #[test]
    fn a_taken_port_is_about_the_tunnels() {
        let taken = Obstacle::GenevePort {
            port: 6081,
            by: "the geneve device g0".to_owned(),
        };
        let failure = Failure::obstacles(&[taken], Severity::Forbids).unwrap();
        assert_eq!(
            (failure.part, failure.reason),
            (Part::Tunnels, reasons::GENEVE_PORT_IN_USE)
        );
    }

    #[test]
    fn a_missing_right_names_the_capabilities() {
        let failure = Failure::from(&FactsError::Rights(vec!["NET_ADMIN"]));
        assert_eq!(
            (failure.part, failure.reason),
            (Part::All, reasons::CAPABILITY_MISSING)
        );
        assert!(
            failure.message.starts_with("the agent lacks NET_ADMIN:"),
            "{}",
            failure.message
        );
    }

    #[test]
    fn what_the_kernel_lacks_is_told_with_what_was_tried() {
        let message = "Warning: Extension set revision 0 not supported, missing kernel module?";
        let failure = apply_error(
            Item::Up("x".to_owned()),
            IptablesError::Failed {
                program: "iptables-nft-restore",
                table: "mangle",
                message: message.to_owned(),
            }
            .into(),
        );
        assert_eq!(failure.reason, reasons::KERNEL_MODULE_MISSING);
        assert!(
            failure.message.contains("modprobe -a xt_set") && failure.message.contains(message),
            "{}",
            failure.message
        );
    }

    #[test]
    fn a_proxy_on_another_kind_of_device_is_told_what_it_needs() {
        let Complaint { reason, message } = Complaint::unusable(&AttachError::NotVeth {
            device: "eth0".to_owned(),
            kind: "of kind macvlan".to_owned(),
        });
        assert_eq!(reason, reasons::PROXY_WITHOUT_VETH);
        assert!(
            message.contains("eth0 is of kind macvlan") && message.contains("veth pairs"),
            "{message}"
        );
        let netkit = Complaint::unusable(&AttachError::Netkit("eth0".to_owned()));
        assert_eq!(netkit.reason, reasons::EBPF_DATA_PATH);
    }
}
