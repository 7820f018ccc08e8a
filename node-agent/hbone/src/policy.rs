//! Authorization: whether a connection may be made. Pure.
//!
//! Rules are alternatives; the clauses of a rule must all match; the matches of a clause are
//! alternatives; within a match every field that is given must match, by any of its values. A DENY
//! that matches wins; then, if there is any ALLOW, one must match. A policy that a workload names and
//! nobody knows denies: a policy that got lost on its way must not open a door.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;

use crate::directory::{Directory, Workload};
use crate::identity::SpiffeId;

/// A policy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Namespace of the policy.
    pub namespace: Arc<str>,
    /// Which workloads it is for.
    pub scope: PolicyScope,
    /// What a match means.
    pub action: PolicyAction,
    /// Only reported, not enforced.
    pub dry_run: bool,
    /// Alternatives.
    pub rules: Vec<Rule>,
}

/// Which workloads a policy is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PolicyScope {
    /// All.
    #[default]
    Global,
    /// Those of its namespace.
    Namespace,
    /// Those that name it.
    Selected,
}

/// What a match means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PolicyAction {
    /// May.
    #[default]
    Allow,
    /// May not.
    Deny,
}

/// Clauses that must all match.
pub type Rule = Vec<Clause>;

/// Matches of which one is enough.
pub type Clause = Vec<Match>;

/// Fields that must all match; one without fields matches nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Match {
    /// The client's namespace.
    pub namespaces: Vec<Text>,
    /// Not the client's namespace.
    pub not_namespaces: Vec<Text>,
    /// The client's identity, without `spiffe://`.
    pub principals: Vec<Text>,
    /// Not the client's identity.
    pub not_principals: Vec<Text>,
    /// The client's address.
    pub source_ips: Vec<IpNet>,
    /// Not the client's address.
    pub not_source_ips: Vec<IpNet>,
    /// The server's address.
    pub destination_ips: Vec<IpNet>,
    /// Not the server's address.
    pub not_destination_ips: Vec<IpNet>,
    /// The server's port.
    pub destination_ports: Vec<u16>,
    /// Not the server's port.
    pub not_destination_ports: Vec<u16>,
    /// The client's namespace and service account.
    pub service_accounts: Vec<(String, String)>,
    /// Not the client's namespace and service account.
    pub not_service_accounts: Vec<(String, String)>,
}

/// How a text is compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Text {
    /// The same.
    Exact(String),
    /// Begins so.
    Prefix(String),
    /// Ends so.
    Suffix(String),
    /// Is there and not empty.
    Present,
}

/// What is known about a connection.
#[derive(Clone, Debug)]
pub struct Connection<'a> {
    /// The client's identity, if it proved one.
    pub client: Option<&'a SpiffeId>,
    /// The client's address.
    pub source: IpAddr,
    /// The server's address and port.
    pub destination: SocketAddr,
}

/// Why a connection may not be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// A DENY matched.
    #[error("denied by policy {0}")]
    By(Arc<str>),
    /// No ALLOW matched.
    #[error("no policy allows it")]
    NotAllowed,
    /// A policy that the workload names is not known.
    #[error("policy {0} of the workload is not known yet")]
    Unknown(Arc<str>),
}

/// Whether a connection to `server` may be made.
///
/// # Errors
/// Why not.
pub fn check(
    directory: &Directory,
    server: Option<&Workload>,
    namespace: &Arc<str>,
    connection: &Connection<'_>,
) -> Result<(), Denied> {
    let mut policies: Vec<(&Arc<str>, &Policy)> = Vec::new();
    for name in server.map_or(&[][..], |server| &server.policies) {
        let policy = directory
            .policy(name)
            .ok_or_else(|| Denied::Unknown(name.clone()))?;
        policies.push((name, policy));
    }
    let unselective = directory.policies_of(namespace);
    policies.extend(unselective.map(|(name, policy)| (name, &**policy)));
    policies.retain(|(_, policy)| !policy.dry_run);
    let of = |action| {
        policies
            .iter()
            .filter(move |(_, policy)| policy.action == action)
    };
    if let Some((name, _)) = of(PolicyAction::Deny).find(|(_, policy)| matches(policy, connection))
    {
        return Err(Denied::By((*name).clone()));
    }
    let mut allows = of(PolicyAction::Allow).peekable();
    if allows.peek().is_some() && !allows.any(|(_, policy)| matches(policy, connection)) {
        return Err(Denied::NotAllowed);
    }
    Ok(())
}

fn matches(policy: &Policy, connection: &Connection<'_>) -> bool {
    policy.rules.iter().any(|rule| {
        !rule.is_empty()
            && rule
                .iter()
                .all(|clause| clause.iter().any(|one| one.matches(connection)))
    })
}

impl Match {
    fn matches(&self, connection: &Connection<'_>) -> bool {
        if *self == Self::default() {
            return false;
        }
        let client = connection.client;
        let namespace = client.map(|id| &**id.namespace());
        let principal = client.map(|id| id.to_string().split_off("spiffe://".len()));
        let text =
            |wanted: &[Text], have: Option<&str>| wanted.iter().any(|text| text.matches(have));
        let net = |nets: &[IpNet], ip: &IpAddr| nets.iter().any(|net| net.contains(ip));
        let account = |wanted: &[(String, String)]| {
            client.is_some_and(|id| {
                wanted
                    .iter()
                    .any(|(ns, sa)| **ns == **id.namespace() && sa == id.service_account())
            })
        };
        let port = connection.destination.port();
        let ip = connection.destination.ip();
        both(&self.namespaces, &self.not_namespaces, |wanted| {
            text(wanted, namespace)
        }) && both(&self.principals, &self.not_principals, |wanted| {
            text(wanted, principal.as_deref())
        }) && both(&self.source_ips, &self.not_source_ips, |nets| {
            net(nets, &connection.source)
        }) && both(&self.destination_ips, &self.not_destination_ips, |nets| {
            net(nets, &ip)
        }) && both(
            &self.destination_ports,
            &self.not_destination_ports,
            |ports| ports.contains(&port),
        ) && both(&self.service_accounts, &self.not_service_accounts, account)
    }
}

fn both<T>(wanted: &[T], unwanted: &[T], found: impl Fn(&[T]) -> bool) -> bool {
    (wanted.is_empty() || found(wanted)) && (unwanted.is_empty() || !found(unwanted))
}

impl Text {
    fn matches(&self, have: Option<&str>) -> bool {
        let Some(have) = have else { return false };
        match self {
            Self::Exact(text) => have == text,
            Self::Prefix(text) => have.starts_with(text.as_str()),
            Self::Suffix(text) => have.ends_with(text.as_str()),
            Self::Present => !have.is_empty(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decide(policies: &[Policy], client: Option<&str>) -> Result<(), Denied> {
        let mut directory = Directory::default();
        for (number, policy) in policies.iter().enumerate() {
            directory.put_policy(format!("shop/p{number}").into(), policy.clone());
        }
        let client = client.map(|text| text.parse::<SpiffeId>().unwrap());
        let connection = Connection {
            client: client.as_ref(),
            source: "10.0.0.1".parse().unwrap(),
            destination: "10.0.0.2:80".parse().unwrap(),
        };
        check(&directory, None, &"shop".into(), &connection)
    }

    fn policy(action: PolicyAction, one: Match) -> Policy {
        Policy {
            action,
            rules: vec![vec![vec![one]]],
            ..Policy::default()
        }
    }

    const ALICE: &str = "spiffe://cluster.local/ns/shop/sa/alice";
    const BOB: &str = "spiffe://cluster.local/ns/shop/sa/bob";

    fn principal(text: &str) -> Match {
        Match {
            principals: vec![Text::Exact(text.to_owned())],
            ..Match::default()
        }
    }

    #[test]
    fn without_policies_everything_is_allowed() {
        assert_eq!(decide(&[], None), Ok(()));
    }

    #[test]
    fn an_allow_denies_what_it_does_not_match() {
        let only_alice = [policy(
            PolicyAction::Allow,
            principal("cluster.local/ns/shop/sa/alice"),
        )];
        assert_eq!(decide(&only_alice, Some(ALICE)), Ok(()));
        assert_eq!(decide(&only_alice, Some(BOB)), Err(Denied::NotAllowed));
        assert_eq!(decide(&only_alice, None), Err(Denied::NotAllowed));
    }

    #[test]
    fn a_deny_wins_over_an_allow() {
        let both = [
            policy(
                PolicyAction::Allow,
                principal("cluster.local/ns/shop/sa/alice"),
            ),
            policy(
                PolicyAction::Deny,
                Match {
                    destination_ports: vec![80],
                    ..Match::default()
                },
            ),
        ];
        assert_eq!(
            decide(&both, Some(ALICE)),
            Err(Denied::By("shop/p1".into()))
        );
    }

    #[test]
    fn strict_mtls_denies_a_client_without_identity() {
        let one = Match {
            not_principals: vec![Text::Present],
            ..Match::default()
        };
        let strict = [policy(PolicyAction::Deny, one)];
        assert_eq!(decide(&strict, Some(ALICE)), Ok(()));
        assert!(decide(&strict, None).is_err());
    }

    #[test]
    fn an_empty_match_matches_nothing() {
        assert_eq!(
            decide(&[policy(PolicyAction::Deny, Match::default())], None),
            Ok(())
        );
    }

    #[test]
    fn a_policy_of_another_namespace_does_not_apply() {
        let mut other = policy(
            PolicyAction::Deny,
            Match {
                destination_ports: vec![80],
                ..Match::default()
            },
        );
        other.scope = PolicyScope::Namespace;
        other.namespace = "elsewhere".into();
        assert_eq!(decide(&[other], None), Ok(()));
    }

    #[test]
    fn a_policy_that_a_workload_names_and_nobody_knows_denies() {
        let mut directory = Directory::default();
        let mut server = crate::directory::tests::workload("w", "10.0.0.2", "n");
        server.policies = vec!["shop/lost".into()];
        let connection = Connection {
            client: None,
            source: "10.0.0.1".parse().unwrap(),
            destination: "10.0.0.2:80".parse().unwrap(),
        };
        let decide =
            |directory: &Directory| check(directory, Some(&server), &"shop".into(), &connection);
        assert_eq!(decide(&directory), Err(Denied::Unknown("shop/lost".into())));
        let selected = Policy {
            scope: PolicyScope::Selected,
            ..policy(PolicyAction::Deny, principal("nobody"))
        };
        directory.put_policy("shop/lost".into(), selected);
        assert_eq!(decide(&directory), Ok(()));
    }

    #[test]
    fn a_policy_that_is_only_tried_denies_nothing() {
        let mut tried = policy(PolicyAction::Allow, principal("nobody"));
        tried.dry_run = true;
        assert_eq!(decide(&[tried], Some(ALICE)), Ok(()));
    }

    #[test]
    fn an_allow_without_rules_denies_everything() {
        let none = Policy {
            rules: Vec::new(),
            ..policy(PolicyAction::Allow, Match::default())
        };
        assert_eq!(decide(&[none], Some(ALICE)), Err(Denied::NotAllowed));
    }
}
