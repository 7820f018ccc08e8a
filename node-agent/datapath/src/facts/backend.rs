//! Which backend of iptables our rules belong into: mixing it with that of kube-proxy and the CNI
//! breaks ClusterIPs. Pure.

use super::saved::Saved;
use crate::input::IptablesBackend;

/// Chains that kubelet and kube-proxy keep in the backend that they use, so that others see which.
const HINTS: [&str; 3] = [
    "KUBE-IPTABLES-HINT",
    "KUBE-KUBELET-CANARY",
    "KUBE-PROXY-CANARY",
];

/// Who uses a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Usage {
    /// We do.
    ours: bool,
    /// kubelet or kube-proxy says so.
    hint: bool,
    /// Rules and chains of others.
    others: usize,
}

/// The backend to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Choice {
    pub(super) backend: IptablesBackend,
    /// The host uses the other one and no longer this.
    pub(super) moved: bool,
}

impl Usage {
    /// What one program printed.
    pub(super) fn of(saved: &Saved) -> Self {
        saved
            .chains()
            .fold(Self::default(), |usage, name| {
                usage.with_chain(name, saved.is_ours(name))
            })
            .with_rules(saved.foreign_rules().count())
    }

    pub(super) fn is_ours(self) -> bool {
        self.ours
    }

    fn with_chain(self, name: &str, is_ours: bool) -> Self {
        Self {
            ours: self.ours || is_ours,
            hint: self.hint || HINTS.contains(&name),
            others: self.others + usize::from(!is_ours),
        }
    }

    fn with_rules(self, rules: usize) -> Self {
        Self {
            others: self.others + rules,
            ..self
        }
    }
}

/// That of a backend, of all its families.
pub(super) fn usage(backend: IptablesBackend, saved: &[Saved]) -> Usage {
    let of_backend = saved.iter().filter(|saved| saved.backend == backend);
    of_backend.fold(Usage::default(), |usage, saved| Usage {
        ours: usage.ours || saved.usage.ours,
        hint: usage.hint || saved.usage.hint,
        others: usage.others + saved.usage.others,
    })
}

/// What holds our chains stays; moving them would leave half of them behind. Else the one that was
/// used before, as long as the host uses it too; else the host's. A host without any rule gets nft,
/// and the choice is made anew until our chains stand.
pub(super) fn choose(kept: Option<IptablesBackend>, nft: Usage, legacy: Usage) -> Choice {
    let uses = |one: Usage, other: Usage| one.others > 0 && (one.hint || !other.hint);
    let (uses_nft, uses_legacy) = (uses(nft, legacy), uses(legacy, nft));
    let hosts = match (uses_nft, uses_legacy) {
        (false, true) => IptablesBackend::Legacy,
        (true, true) if legacy.others > nft.others => IptablesBackend::Legacy,
        _ => IptablesBackend::Nft,
    };
    let is_used = |backend| match backend {
        IptablesBackend::Nft => uses_nft,
        IptablesBackend::Legacy => uses_legacy,
    };
    let none_used = !uses_nft && !uses_legacy;
    let backend = match (nft.ours, legacy.ours) {
        (true, false) => IptablesBackend::Nft,
        (false, true) => IptablesBackend::Legacy,
        _ => kept
            .filter(|kept| is_used(*kept) || none_used)
            .unwrap_or(hosts),
    };
    Choice {
        backend,
        moved: !is_used(backend) && !none_used,
    }
}

#[cfg(test)]
mod tests {
    use IptablesBackend::{Legacy, Nft};

    use super::*;
    use crate::family::Family;
    use crate::names::Names;

    const NONE: Usage = Usage {
        ours: false,
        hint: false,
        others: 0,
    };
    const OURS: Usage = Usage { ours: true, ..NONE };

    fn others(others: usize) -> Usage {
        Usage { others, ..NONE }
    }

    fn hinted(others: usize) -> Usage {
        Usage {
            hint: true,
            others,
            ..NONE
        }
    }

    fn chosen(kept: Option<IptablesBackend>, nft: Usage, legacy: Usage) -> (IptablesBackend, bool) {
        let Choice { backend, moved } = choose(kept, nft, legacy);
        (backend, moved)
    }

    #[test]
    fn the_hosts_backend_is_chosen() {
        assert_eq!(chosen(None, others(9), NONE), (Nft, false));
        assert_eq!(chosen(None, NONE, others(9)), (Legacy, false));
        assert_eq!(chosen(None, others(3), others(9)), (Legacy, false));
    }

    #[test]
    fn what_kubelet_and_kube_proxy_say_counts_more_than_the_number_of_rules() {
        assert_eq!(chosen(None, others(90), hinted(2)), (Legacy, false));
        assert_eq!(chosen(Some(Nft), others(90), hinted(2)), (Legacy, false));
    }

    #[test]
    fn a_host_without_rules_gets_nft_until_it_shows_what_it_uses() {
        assert_eq!(chosen(None, NONE, NONE), (Nft, false));
        assert_eq!(chosen(Some(Nft), NONE, hinted(5)), (Legacy, false));
    }

    #[test]
    fn the_backend_that_was_used_stays_while_the_host_uses_it() {
        assert_eq!(chosen(Some(Nft), others(3), others(9)), (Nft, false));
        assert_eq!(chosen(Some(Legacy), NONE, NONE), (Legacy, false));
    }

    #[test]
    fn where_our_chains_are_we_stay_and_a_host_that_has_moved_is_noticed() {
        assert_eq!(chosen(None, OURS, NONE), (Nft, false));
        assert_eq!(chosen(None, OURS, others(9)), (Nft, true));
        let both = Usage {
            ours: true,
            ..others(9)
        };
        assert_eq!(chosen(Some(Legacy), both, hinted(2)), (Nft, true));
        assert_eq!(chosen(None, both, others(20)), (Nft, false));
        assert_eq!(chosen(Some(Legacy), OURS, OURS), (Legacy, false));
    }

    #[test]
    fn rules_chains_and_hints_are_counted_and_ours_are_not() {
        let text = "*mangle
:PREROUTING ACCEPT [0:0]
:KUBE-IPTABLES-HINT - [0:0]
:ztunnel-PREROUTING - [0:0]
-A PREROUTING -j ztunnel-PREROUTING
-A ztunnel-PREROUTING -j RETURN
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:KUBE-SERVICES - [0:0]
-A PREROUTING -j KUBE-SERVICES
COMMIT
";
        let saved = Saved::new((Nft, Family::V4), None, text.to_owned(), Names::default());
        let expected = Usage {
            ours: true,
            hint: true,
            others: 3,
        };
        assert_eq!(usage(Nft, std::slice::from_ref(&saved)), expected);
        assert_eq!(usage(Legacy, &[saved]), NONE);
    }
}
