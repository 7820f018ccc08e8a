//! Policies of the wire into those of the directory. Pure.
//!
//! What we do not understand must not be left out: a rule with a part missing would match more or
//! less than it should. So a policy is taken whole or not at all.

use hbone::policy::{Clause, Match, Policy, PolicyAction, PolicyScope, Rule, Text};
use ipnet::IpNet;
use protocol::authorization::string_match::MatchType;
use protocol::authorization::{self as wire, Action, Authorization, Scope};

use super::parse::{address, port};

/// Checks a policy.
pub(crate) fn policy(message: &Authorization) -> Result<Policy, String> {
    let scope = match Scope::try_from(message.scope) {
        Ok(Scope::Global) => PolicyScope::Global,
        Ok(Scope::Namespace) => PolicyScope::Namespace,
        Ok(Scope::WorkloadSelector) => PolicyScope::Selected,
        Err(_) => return Err(format!("scope {} is not known", message.scope)),
    };
    let action = match Action::try_from(message.action) {
        Ok(Action::Allow) => PolicyAction::Allow,
        Ok(Action::Deny) => PolicyAction::Deny,
        Err(_) => return Err(format!("action {} is not known", message.action)),
    };
    if !message.extensions.is_empty() {
        return Err("it has extensions, which are not understood".to_owned());
    }
    let rules: Result<Vec<Rule>, String> = message.rules.iter().map(rule).collect();
    Ok(Policy {
        namespace: message.namespace.as_str().into(),
        scope,
        action,
        dry_run: message.dry_run,
        rules: rules?,
    })
}

/// What stands in for a policy that cannot be read: as far as it reaches, nothing is allowed.
pub(crate) fn deny_everything(message: &Authorization) -> Policy {
    let scope = match Scope::try_from(message.scope) {
        Ok(Scope::Global) => PolicyScope::Global,
        Ok(Scope::WorkloadSelector) => PolicyScope::Selected,
        Ok(Scope::Namespace) | Err(_) => PolicyScope::Namespace,
    };
    Policy {
        namespace: message.namespace.as_str().into(),
        scope,
        // An ALLOW without rules allows nothing.
        action: PolicyAction::Allow,
        dry_run: message.dry_run,
        rules: Vec::new(),
    }
}

fn rule(message: &wire::Rule) -> Result<Rule, String> {
    message.clauses.iter().map(clause).collect()
}

fn clause(message: &wire::Clause) -> Result<Clause, String> {
    message.matches.iter().map(one_match).collect()
}

fn one_match(message: &wire::Match) -> Result<Match, String> {
    // Taken apart completely, so that a new field cannot be forgotten.
    let wire::Match {
        namespaces,
        not_namespaces,
        principals,
        not_principals,
        source_ips,
        not_source_ips,
        destination_ips,
        not_destination_ips,
        destination_ports,
        not_destination_ports,
        service_accounts,
        not_service_accounts,
        extensions,
    } = message;
    if !extensions.is_empty() {
        return Err("a match has extensions, which are not understood".to_owned());
    }
    Ok(Match {
        namespaces: texts(namespaces)?,
        not_namespaces: texts(not_namespaces)?,
        principals: texts(principals)?,
        not_principals: texts(not_principals)?,
        source_ips: nets(source_ips)?,
        not_source_ips: nets(not_source_ips)?,
        destination_ips: nets(destination_ips)?,
        not_destination_ips: nets(not_destination_ips)?,
        destination_ports: ports(destination_ports)?,
        not_destination_ports: ports(not_destination_ports)?,
        service_accounts: accounts(service_accounts),
        not_service_accounts: accounts(not_service_accounts),
    })
}

fn texts(list: &[wire::StringMatch]) -> Result<Vec<Text>, String> {
    list.iter()
        .map(|text| match &text.match_type {
            Some(MatchType::Exact(text)) => Ok(Text::Exact(text.clone())),
            Some(MatchType::Prefix(text)) => Ok(Text::Prefix(text.clone())),
            Some(MatchType::Suffix(text)) => Ok(Text::Suffix(text.clone())),
            Some(MatchType::Presence(_)) => Ok(Text::Present),
            None => Err("a text is compared in a way that is not known".to_owned()),
        })
        .collect()
}

fn nets(list: &[wire::Address]) -> Result<Vec<IpNet>, String> {
    list.iter()
        .map(|net| {
            let ip = address(&net.address)?;
            let bad = || format!("{ip}/{} is no network", net.length);
            let length = u8::try_from(net.length).map_err(|_| bad())?;
            IpNet::new(ip, length).map_err(|_| bad())
        })
        .collect()
}

fn ports(list: &[u32]) -> Result<Vec<u16>, String> {
    list.iter().map(|number| port(*number)).collect()
}

fn accounts(list: &[wire::ServiceAccountMatch]) -> Vec<(String, String)> {
    list.iter()
        .map(|account| (account.namespace.clone(), account.service_account.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message;

    use super::*;

    fn with(one: wire::Match) -> Authorization {
        Authorization {
            namespace: "shop".to_owned(),
            scope: Scope::WorkloadSelector.into(),
            action: Action::Deny.into(),
            rules: vec![wire::Rule {
                clauses: vec![wire::Clause { matches: vec![one] }],
            }],
            ..Authorization::default()
        }
    }

    #[test]
    fn a_policy_is_taken_whole() {
        let exact = MatchType::Exact("td/ns/shop/sa/web".to_owned());
        let message = with(wire::Match {
            principals: vec![wire::StringMatch {
                match_type: Some(exact),
            }],
            source_ips: vec![wire::Address {
                address: vec![10, 0, 0, 0],
                length: 8,
            }],
            destination_ports: vec![80],
            ..wire::Match::default()
        });
        let parsed = policy(&message).unwrap();
        assert_eq!(parsed.scope, PolicyScope::Selected);
        assert_eq!(parsed.action, PolicyAction::Deny);
        let one = &parsed.rules[0][0][0];
        assert_eq!(
            one.principals,
            [Text::Exact("td/ns/shop/sa/web".to_owned())]
        );
        assert_eq!(one.source_ips, ["10.0.0.0/8".parse::<IpNet>().unwrap()]);
        assert_eq!(one.destination_ports, [80]);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let bad = [
            wire::Match {
                extensions: vec![wire::Extension::default()],
                ..wire::Match::default()
            },
            wire::Match {
                principals: vec![wire::StringMatch::default()],
                ..wire::Match::default()
            },
            wire::Match {
                destination_ports: vec![70_000],
                ..wire::Match::default()
            },
            wire::Match {
                source_ips: vec![wire::Address {
                    address: vec![10, 0, 0, 0],
                    length: 33,
                }],
                ..wire::Match::default()
            },
        ];
        for one in bad {
            assert!(policy(&with(one.clone())).is_err(), "{one:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(message) = Authorization::decode(&*bytes) {
                let _ = policy(&message);
            }
        }
    }
}
