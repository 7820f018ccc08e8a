//! From discovery's messages to the directory's types. Every check of them happens here. Pure.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use hbone::directory::{Balancing, Locality, Scope, Service, Workload};
use hbone::identity::{IdentityError, SpiffeId, TrustDomain};
use hbone::policy::{Match, Policy, PolicyAction, PolicyScope, Text};
use ipnet::IpNet;
use prost::Message;
use protocol::authorization::{self as authorization, string_match::MatchType};
use protocol::workload::load_balancing::{self, HealthPolicy, Mode};
use protocol::workload::{self as wire, TunnelProtocol, WorkloadStatus, WorkloadType, address};

/// What an address resource holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Parsed {
    /// A workload.
    Workload(Box<Workload>),
    /// A service.
    Service(Service),
}

/// A resource that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ParseError {
    #[error("it is empty")]
    Empty,
    #[error("it is not the message that its type says: {0}")]
    Message(#[from] prost::DecodeError),
    #[error("an address of {0} bytes: 4 or 16 are an address")]
    Address(usize),
    #[error("a network of {0} bits: more than its address has")]
    Prefix(u32),
    #[error("{0} is not a port")]
    Port(u32),
    #[error("its identity")]
    Identity(#[from] IdentityError),
    #[error("{field} {value} is not known here")]
    Unknown { field: &'static str, value: i32 },
    #[error("the extension {0:?} is not known here")]
    Extension(String),
    #[error("a match without a value")]
    NoMatch,
}

/// Trust domain of a workload that names none (the field's default).
const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";

/// A workload or a service under this resource name.
pub(crate) fn address(name: &str, bytes: &[u8]) -> Result<Parsed, ParseError> {
    match wire::Address::decode(bytes)?.r#type {
        Some(address::Type::Workload(found)) => {
            Ok(Parsed::Workload(Box::new(workload(name, found)?)))
        }
        Some(address::Type::Service(found)) => service(name, found).map(Parsed::Service),
        None => Err(ParseError::Empty),
    }
}

fn workload(name: &str, found: wire::Workload) -> Result<Workload, ParseError> {
    let hbone = match TunnelProtocol::try_from(found.tunnel_protocol) {
        Ok(TunnelProtocol::Hbone) => Some(identity(&found)?),
        Ok(TunnelProtocol::None | TunnelProtocol::LegacyIstioMtls) => None,
        // Not a case for plaintext: whoever sent this wants something that is not known here.
        Err(_) => return Err(unknown("tunnel_protocol", found.tunnel_protocol)),
    };
    let addresses = found.addresses.iter().map(|bytes| ip(bytes));
    let services = found.services.into_iter();
    let services = services.map(|(key, list)| Ok((Arc::from(key), port_pairs(&list.ports)?)));
    let locality = found.locality.unwrap_or_default();
    Ok(Workload {
        uid: name.into(),
        hbone,
        addresses: addresses.collect::<Result<_, _>>()?,
        services: services.collect::<Result<_, ParseError>>()?,
        healthy: found.status == WorkloadStatus::Healthy as i32,
        locality: Locality {
            region: locality.region,
            zone: locality.zone,
            subzone: locality.subzone,
        },
        workload_name: or(&found.workload_name, &found.name).into(),
        workload_type: workload_type(found.workload_type)?,
        name: found.name.into(),
        namespace: found.namespace.into(),
        service_account: found.service_account,
        node: found.node,
        network: found.network,
        canonical_name: found.canonical_name.into(),
        canonical_revision: found.canonical_revision,
        cluster: found.cluster_id,
        policies: found
            .authorization_policies
            .into_iter()
            .map(Arc::from)
            .collect(),
    })
}

fn identity(found: &wire::Workload) -> Result<SpiffeId, ParseError> {
    let trust_domain = TrustDomain::new(or(&found.trust_domain, DEFAULT_TRUST_DOMAIN))?;
    let id = SpiffeId::new(&trust_domain, &found.namespace, &found.service_account)?;
    Ok(id)
}

/// The owner's kind, in the words of the field's telemetry.
fn workload_type(value: i32) -> Result<&'static str, ParseError> {
    match WorkloadType::try_from(value) {
        Ok(WorkloadType::Deployment) => Ok("deployment"),
        Ok(WorkloadType::Cronjob) => Ok("cronjob"),
        Ok(WorkloadType::Pod) => Ok("pod"),
        Ok(WorkloadType::Job) => Ok("job"),
        Err(_) => Err(unknown("workload_type", value)),
    }
}

fn service(name: &str, found: wire::Service) -> Result<Service, ParseError> {
    let mut addresses = Vec::new();
    for network in &found.addresses {
        let address = ip(&network.address)?;
        // A service of a whole network has no virtual address of its own.
        if network.length.is_none_or(|length| length == bits(address)) {
            addresses.push(address);
        }
    }
    Ok(Service {
        key: name.into(),
        name: found.name.into(),
        namespace: found.namespace.into(),
        hostname: found.hostname.into(),
        addresses,
        ports: port_pairs(&found.ports)?,
        balancing: found
            .load_balancing
            .map_or_else(|| Ok(Balancing::default()), |found| balancing(&found))?,
    })
}

/// Service ports, each with the port behind it.
fn port_pairs(pairs: &[wire::Port]) -> Result<BTreeMap<u16, u16>, ParseError> {
    let pairs = pairs.iter();
    pairs
        .map(|pair| Ok((port(pair.service_port)?, port(pair.target_port)?)))
        .collect()
}

fn balancing(found: &wire::LoadBalancing) -> Result<Balancing, ParseError> {
    let preference = found
        .routing_preference
        .iter()
        .map(|value| scope(*value))
        .collect::<Result<_, _>>()?;
    let strict = match Mode::try_from(found.mode) {
        Ok(Mode::Strict) => true,
        Ok(Mode::UnspecifiedMode | Mode::Failover | Mode::Passthrough) => false,
        Err(_) => return Err(unknown("load_balancing.mode", found.mode)),
    };
    let allow_unhealthy = match HealthPolicy::try_from(found.health_policy) {
        Ok(HealthPolicy::OnlyHealthy) => false,
        Ok(HealthPolicy::AllowAll) => true,
        Err(_) => return Err(unknown("load_balancing.health_policy", found.health_policy)),
    };
    Ok(Balancing {
        preference,
        strict,
        allow_unhealthy,
    })
}

fn scope(value: i32) -> Result<Scope, ParseError> {
    use load_balancing::Scope as Wire;
    match Wire::try_from(value) {
        Ok(Wire::Region) => Ok(Scope::Region),
        Ok(Wire::Zone) => Ok(Scope::Zone),
        Ok(Wire::Subzone) => Ok(Scope::Subzone),
        Ok(Wire::Node) => Ok(Scope::Node),
        Ok(Wire::Cluster) => Ok(Scope::Cluster),
        Ok(Wire::Network) => Ok(Scope::Network),
        Ok(Wire::UnspecifiedScope) | Err(_) => {
            Err(unknown("load_balancing.routing_preference", value))
        }
    }
}

/// An authorization policy.
pub(crate) fn policy(bytes: &[u8]) -> Result<Policy, ParseError> {
    let found = authorization::Authorization::decode(bytes)?;
    if let Some(extension) = found.extensions.first() {
        return Err(ParseError::Extension(extension.name.clone()));
    }
    let scope = match authorization::Scope::try_from(found.scope) {
        Ok(authorization::Scope::Global) => PolicyScope::Global,
        Ok(authorization::Scope::Namespace) => PolicyScope::Namespace,
        Ok(authorization::Scope::WorkloadSelector) => PolicyScope::Selected,
        Err(_) => return Err(unknown("scope", found.scope)),
    };
    let action = match authorization::Action::try_from(found.action) {
        Ok(authorization::Action::Allow) => PolicyAction::Allow,
        Ok(authorization::Action::Deny) => PolicyAction::Deny,
        Err(_) => return Err(unknown("action", found.action)),
    };
    let rules = found.rules.into_iter().map(|rule| {
        let clauses = rule.clauses.into_iter();
        clauses
            .map(|clause| clause.matches.into_iter().map(policy_match).collect())
            .collect()
    });
    Ok(Policy {
        namespace: found.namespace.into(),
        scope,
        action,
        dry_run: found.dry_run,
        rules: rules.collect::<Result<_, _>>()?,
    })
}

fn policy_match(found: authorization::Match) -> Result<Match, ParseError> {
    if let Some(extension) = found.extensions.first() {
        return Err(ParseError::Extension(extension.name.clone()));
    }
    Ok(Match {
        namespaces: texts(found.namespaces)?,
        not_namespaces: texts(found.not_namespaces)?,
        principals: texts(found.principals)?,
        not_principals: texts(found.not_principals)?,
        source_ips: networks(&found.source_ips)?,
        not_source_ips: networks(&found.not_source_ips)?,
        destination_ips: networks(&found.destination_ips)?,
        not_destination_ips: networks(&found.not_destination_ips)?,
        destination_ports: ports(&found.destination_ports)?,
        not_destination_ports: ports(&found.not_destination_ports)?,
        service_accounts: accounts(found.service_accounts),
        not_service_accounts: accounts(found.not_service_accounts),
    })
}

fn texts(found: Vec<authorization::StringMatch>) -> Result<Vec<Text>, ParseError> {
    let texts = found.into_iter().map(|text| match text.match_type {
        Some(MatchType::Exact(text)) => Ok(Text::Exact(text)),
        Some(MatchType::Prefix(text)) => Ok(Text::Prefix(text)),
        Some(MatchType::Suffix(text)) => Ok(Text::Suffix(text)),
        Some(MatchType::Presence(_)) => Ok(Text::Present),
        None => Err(ParseError::NoMatch),
    });
    texts.collect()
}

fn networks(found: &[authorization::Address]) -> Result<Vec<IpNet>, ParseError> {
    let networks = found.iter().map(|network| {
        let length =
            u8::try_from(network.length).map_err(|_| ParseError::Prefix(network.length))?;
        IpNet::new(ip(&network.address)?, length).map_err(|_| ParseError::Prefix(network.length))
    });
    networks.collect()
}

fn ports(found: &[u32]) -> Result<Vec<u16>, ParseError> {
    found.iter().map(|number| port(*number)).collect()
}

fn accounts(found: Vec<authorization::ServiceAccountMatch>) -> Vec<(String, String)> {
    found
        .into_iter()
        .map(|account| (account.namespace, account.service_account))
        .collect()
}

fn ip(bytes: &[u8]) -> Result<IpAddr, ParseError> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return Ok(Ipv4Addr::from(four).into());
    }
    let sixteen = <[u8; 16]>::try_from(bytes).map_err(|_| ParseError::Address(bytes.len()))?;
    // An IPv4 address may come in its IPv6 form.
    Ok(IpAddr::from(Ipv6Addr::from(sixteen)).to_canonical())
}

fn bits(address: IpAddr) -> u32 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn port(number: u32) -> Result<u16, ParseError> {
    u16::try_from(number).map_err(|_| ParseError::Port(number))
}

fn or<'a>(text: &'a str, default: &'a str) -> &'a str {
    if text.is_empty() { default } else { text }
}

fn unknown(field: &'static str, value: i32) -> ParseError {
    ParseError::Unknown { field, value }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encoded(workload: wire::Workload) -> Vec<u8> {
        wire::Address {
            r#type: Some(address::Type::Workload(workload)),
        }
        .encode_to_vec()
    }

    #[test]
    fn a_workload_keeps_what_it_says() {
        let bytes = encoded(wire::Workload {
            name: "web-1".to_owned(),
            namespace: "shop".to_owned(),
            service_account: "web".to_owned(),
            addresses: vec![vec![10, 1, 2, 3].into()],
            tunnel_protocol: TunnelProtocol::Hbone.into(),
            services: [(
                "shop/web.shop.svc.cluster.local".to_owned(),
                wire::PortList {
                    ports: vec![wire::Port {
                        service_port: 80,
                        target_port: 8080,
                        app_protocol: 0,
                    }],
                },
            )]
            .into(),
            ..wire::Workload::default()
        });
        let Parsed::Workload(workload) = address("uid-1", &bytes).unwrap() else {
            panic!("a workload");
        };
        assert_eq!(&*workload.uid, "uid-1");
        assert_eq!(
            workload.hbone.unwrap().to_string(),
            "spiffe://cluster.local/ns/shop/sa/web"
        );
        assert!(workload.healthy);
        assert_eq!(workload.addresses, ["10.1.2.3".parse::<IpAddr>().unwrap()]);
        assert_eq!(
            workload.services["shop/web.shop.svc.cluster.local"],
            BTreeMap::from([(80, 8080)])
        );
    }

    #[test]
    fn an_unknown_tunnel_protocol_is_refused_and_not_taken_for_plaintext() {
        let bytes = encoded(wire::Workload {
            namespace: "shop".to_owned(),
            tunnel_protocol: 9,
            ..wire::Workload::default()
        });
        assert_eq!(address("a", &bytes), Err(unknown("tunnel_protocol", 9)));
    }

    #[test]
    fn a_policy_with_an_extension_is_refused() {
        let policy_bytes = authorization::Authorization {
            extensions: vec![authorization::Extension {
                name: "x".to_owned(),
                config: None,
            }],
            ..authorization::Authorization::default()
        }
        .encode_to_vec();
        assert_eq!(
            policy(&policy_bytes),
            Err(ParseError::Extension("x".to_owned()))
        );
    }

    #[test]
    fn a_virtual_network_is_no_virtual_address() {
        let network = |length| wire::NetworkAddress {
            address: vec![10, 0, 0, 0],
            length,
            ..wire::NetworkAddress::default()
        };
        let found = wire::Service {
            addresses: vec![network(Some(8)), network(None), network(Some(32))],
            ..wire::Service::default()
        };
        assert_eq!(service("a/b", found).unwrap().addresses.len(), 2);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = address("name", &bytes);
            let _ = policy(&bytes);
        }
    }
}
