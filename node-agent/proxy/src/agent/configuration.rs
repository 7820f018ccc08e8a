//! What the agent said, checked. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use hbone::ListenerKind;
use hbone::identity::{SpiffeId, TrustDomain};
use hbone::local::{LocalWorkload, LocalWorkloads};
use hbone::serve::Listener;
use protocol::node::{self, Configure, Duty, LocalTraffic};

/// Everything that the agent wants.
#[derive(Clone, Debug, Default)]
pub(crate) struct Configuration {
    pub(crate) generation: u64,
    pub(crate) listeners: BTreeSet<Listener>,
    pub(crate) workloads: Arc<LocalWorkloads>,
    /// UID and reason of what cannot be served.
    pub(crate) refused: BTreeMap<String, String>,
    /// Two pods of this node talk through a tunnel.
    pub(crate) local_by_tunnel: bool,
    /// Whether new connections of the node come to this proxy; none if that is not decided.
    pub(crate) active: Option<bool>,
}

impl Configuration {
    /// Checks a message. What is wrong with one workload does not keep the others waiting.
    pub(crate) fn parse(trust_domain: &TrustDomain, message: Configure) -> Self {
        let mut refused = BTreeMap::new();
        let mut workloads = Vec::new();
        for workload in &message.workloads {
            match parse_workload(trust_domain, workload) {
                Ok(parsed) => workloads.push(parsed),
                Err(error) => {
                    refused.insert(workload.uid.clone(), error);
                }
            }
        }
        Self {
            generation: message.generation,
            listeners: message
                .listeners
                .iter()
                .filter_map(parse_listener)
                .collect(),
            workloads: Arc::new(workloads.into_iter().collect()),
            refused,
            local_by_tunnel: message.local_traffic() == LocalTraffic::Hbone,
            active: match message.duty() {
                Duty::Unspecified => None,
                Duty::Standby => Some(false),
                Duty::Active => Some(true),
            },
        }
    }
}

fn parse_workload(
    trust_domain: &TrustDomain,
    workload: &node::Workload,
) -> Result<LocalWorkload, String> {
    let node::Workload {
        uid,
        namespace,
        name,
        service_account,
        ips,
    } = workload;
    if uid.is_empty() {
        return Err("it has no UID".to_owned());
    }
    let addresses: Result<Vec<IpAddr>, String> = ips.iter().map(|ip| address(ip)).collect();
    let identity = SpiffeId::new(trust_domain, namespace, service_account);
    Ok(LocalWorkload {
        uid: uid.as_str().into(),
        namespace: namespace.as_str().into(),
        name: name.as_str().into(),
        identity: identity.map_err(|error| error.to_string())?,
        addresses: addresses?,
    })
}

/// An IPv4-mapped address is the IPv4 address that it stands for.
fn address(text: &str) -> Result<IpAddr, String> {
    let address: Result<IpAddr, _> = text.parse();
    let address = address.map_err(|_| format!("{text:?} is no address"))?;
    Ok(address.to_canonical())
}

/// A listener of a kind that is not known is of a newer agent, and its port no port of ours.
fn parse_listener(listener: &node::Listener) -> Option<Listener> {
    let kind = match listener.kind() {
        node::ListenerKind::Outbound => ListenerKind::Outbound,
        node::ListenerKind::Inbound => ListenerKind::Inbound,
        node::ListenerKind::InboundPlaintext => ListenerKind::InboundPlaintext,
        node::ListenerKind::Unspecified => return None,
    };
    let port = u16::try_from(listener.port).ok().filter(|port| *port > 0)?;
    Some((kind, port))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn workload(uid: &str, ip: &str) -> node::Workload {
        node::Workload {
            uid: uid.to_owned(),
            namespace: "shop".to_owned(),
            name: uid.to_owned(),
            service_account: "web".to_owned(),
            ips: vec![ip.to_owned()],
        }
    }

    pub(crate) fn parse(workloads: Vec<node::Workload>) -> Configuration {
        let listener = |kind: node::ListenerKind, port| node::Listener {
            kind: kind.into(),
            port,
        };
        let message = Configure {
            generation: 7,
            listeners: vec![
                listener(node::ListenerKind::Outbound, 15001),
                listener(node::ListenerKind::Inbound, 15008),
                listener(node::ListenerKind::InboundPlaintext, 70_000),
                listener(node::ListenerKind::Unspecified, 1),
            ],
            workloads,
            local_traffic: LocalTraffic::Hbone.into(),
            duty: Duty::Standby.into(),
        };
        Configuration::parse(&TrustDomain::new("td").unwrap(), message)
    }

    #[test]
    fn pods_get_the_identity_of_their_service_account() {
        let parsed = parse(vec![workload("a", "10.0.0.1")]);
        let pod = parsed.workloads.at("10.0.0.1".parse().unwrap()).unwrap();
        assert_eq!(pod.identity.to_string(), "spiffe://td/ns/shop/sa/web");
        assert!(parsed.local_by_tunnel);
        assert_eq!(parsed.generation, 7);
        assert_eq!(parsed.active, Some(false));
    }

    #[test]
    fn a_pod_is_found_by_each_of_its_addresses() {
        let mut both = workload("a", "::ffff:10.0.0.1");
        both.ips.push("fd00::1".to_owned());
        let parsed = parse(vec![both, workload("b", "fd00::2")]);
        for (ip, uid) in [("10.0.0.1", "a"), ("fd00::1", "a"), ("fd00::2", "b")] {
            let found = parsed.workloads.at(ip.parse().unwrap());
            assert_eq!(found.map(|pod| &*pod.uid), Some(uid), "{ip}");
        }
    }

    #[test]
    fn one_bad_pod_does_not_keep_the_others_out() {
        let parsed = parse(vec![workload("a", "10.0.0.1"), workload("b", "ten")]);
        assert_eq!(parsed.workloads.iter().count(), 1);
        assert_eq!(parsed.refused["b"], "\"ten\" is no address");
    }

    #[test]
    fn listeners_of_unknown_kind_or_port_are_left_out() {
        let wanted = [
            (ListenerKind::Outbound, 15001),
            (ListenerKind::Inbound, 15008),
        ];
        assert_eq!(parse(Vec::new()).listeners, BTreeSet::from(wanted));
    }
}
