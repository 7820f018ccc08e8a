//! What went wrong in a pass, as a condition says it. Pure.

use std::error::Error;

use crds::reasons;
use datapath::Item;
use datapath::facts::{Conflict, FactsError};
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
}

/// Why the kernel does not hold what it should.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) part: Part,
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

    /// Others use our marks, so nothing is begun.
    pub(crate) fn conflicts(conflicts: &[Conflict]) -> Option<Self> {
        let of_marks: Vec<String> = conflicts
            .iter()
            .filter(|conflict| !matches!(conflict, Conflict::Geneve(_)))
            .map(ToString::to_string)
            .collect();
        let message = of_marks.join("; ");
        (!of_marks.is_empty()).then(|| Self::redirection(reasons::MARKS_CONFLICT, message))
    }

    /// kube-proxy's mode hides ClusterIPs from us.
    pub(crate) fn ipvs() -> Self {
        Self::redirection(
            reasons::IPVS_UNSUPPORTED,
            "kube-proxy runs in IPVS mode (device kube-ipvs0), so traffic to ClusterIPs cannot be redirected; \
             set kube-proxy's mode to iptables or nftables",
        )
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

impl From<&FactsError> for Failure {
    fn from(error: &FactsError) -> Self {
        let reason = match error {
            FactsError::Iptables(IptablesError::Missing(_)) => reasons::IPTABLES_MISSING,
            _ => reasons::OBSERVE_FAILED,
        };
        Self::redirection(reason, chain(error))
    }
}

impl From<&KernelError> for Failure {
    fn from(error: &KernelError) -> Self {
        let reason = match error {
            KernelError::Iptables(IptablesError::Missing(_)) => reasons::IPTABLES_MISSING,
            _ => reasons::OBSERVE_FAILED,
        };
        Self::redirection(reason, chain(error))
    }
}

impl From<&ApplyError> for Failure {
    fn from(error: &ApplyError) -> Self {
        let reason = match &error.cause {
            KernelError::Netlink(NetlinkError::GeneveUnsupported) => reasons::GENEVE_UNSUPPORTED,
            KernelError::Netlink(NetlinkError::ForeignDevice(_)) => reasons::FOREIGN_DEVICE,
            KernelError::Iptables(IptablesError::Missing(_)) => reasons::IPTABLES_MISSING,
            KernelError::IpSet(IpSetError::Full { .. }) => reasons::SET_FULL,
            _ => reasons::APPLY_FAILED,
        };
        let part = match error.step.change.item() {
            Item::Link(_) | Item::Up(_) | Item::Address(_) => Part::Tunnels,
            _ => Part::Redirection,
        };
        let message = match reason {
            reasons::APPLY_FAILED => chain(error),
            // These say themselves what they are about and what to do.
            _ => chain(&error.cause),
        };
        Self {
            part,
            reason,
            message,
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
    use datapath::Place;
    use datapath::plan::{Change, Step};

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
            Item::Set(datapath::Family::V4),
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
        let ip = "10.0.0.4".parse().unwrap();
        let failure = apply_error(Item::Member(ip), IpSetError::Full { ip }.into());
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
    fn another_geneve_device_alone_is_no_conflict_of_marks() {
        assert_eq!(
            Failure::conflicts(&[Conflict::Geneve("g0".to_owned())]),
            None
        );
        let failure = Failure::conflicts(&[Conflict::RuleMark(0x100)]).unwrap();
        assert_eq!(failure.reason, reasons::MARKS_CONFLICT);
        assert!(failure.message.contains("0x100"), "{}", failure.message);
    }
}
