//! Workloads and services of the wire into those of the directory. Pure.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use super::intern::Interner;
use hbone::directory::{Balancing, Locality, Scope, ServedPorts, Service, Workload};
use hbone::identity::{SpiffeId, TrustDomain};
use protocol::workload::load_balancing::{self, HealthPolicy, Mode};
use protocol::workload::{
    self as wire, LoadBalancing, NetworkAddress, NetworkMode, Port, TunnelProtocol, WorkloadStatus,
    WorkloadType,
};

/// Checks a workload.
pub(crate) fn workload(
    own_trust_domain: &TrustDomain,
    interner: &mut Interner,
    message: wire::Workload,
) -> Result<Workload, String> {
    if message.uid.is_empty() {
        return Err("it has no UID".to_owned());
    }
    let hbone = match message.tunnel_protocol() {
        TunnelProtocol::Hbone => Some(interner.identity(identity(own_trust_domain, &message)?)),
        TunnelProtocol::None | TunnelProtocol::LegacyIstioMtls => None,
    };
    let addresses: Result<Vec<IpAddr>, String> = message
        .addresses
        .iter()
        .map(|bytes| address(bytes))
        .collect();
    let services: Result<ServedPorts, String> = message
        .services
        .iter()
        .map(|(key, list)| Ok((interner.text(key), endpoint_ports(&list.ports)?)))
        .collect();
    let (status, kind, mode) = (
        message.status(),
        message.workload_type(),
        message.network_mode(),
    );
    let locality = message.locality.unwrap_or_default();
    Ok(Workload {
        uid: message.uid.into(),
        name: message.name.into(),
        namespace: interner.text(&message.namespace),
        service_account: interner.text(&message.service_account),
        hbone,
        addresses: addresses?,
        host_network: mode == NetworkMode::HostNetwork,
        node: interner.text(&message.node),
        network: interner.text(&message.network),
        healthy: status == WorkloadStatus::Healthy,
        locality: Locality {
            region: interner.text(&locality.region),
            zone: interner.text(&locality.zone),
            subzone: interner.text(&locality.subzone),
        },
        workload_name: interner.text(&message.workload_name),
        workload_type: kind_name(kind),
        canonical_name: interner.text(&message.canonical_name),
        canonical_revision: interner.text(&message.canonical_revision),
        cluster: interner.text(&message.cluster_id),
        services: interner.services(services?),
        policies: message
            .authorization_policies
            .iter()
            .map(|name| interner.text(name))
            .collect(),
    })
}

fn identity(own: &TrustDomain, message: &wire::Workload) -> Result<SpiffeId, String> {
    let other = match message.trust_domain.as_str() {
        "" => None,
        name => Some(TrustDomain::new(name).map_err(|error| error.to_string())?),
    };
    let trust_domain = other.as_ref().unwrap_or(own);
    SpiffeId::new(trust_domain, &message.namespace, &message.service_account)
        .map_err(|error| error.to_string())
}

fn kind_name(kind: WorkloadType) -> &'static str {
    match kind {
        WorkloadType::Deployment => "deployment",
        WorkloadType::Cronjob => "cronjob",
        WorkloadType::Pod => "pod",
        WorkloadType::Job => "job",
    }
}

/// Checks a service.
pub(crate) fn service(message: wire::Service) -> Result<Service, String> {
    if message.namespace.is_empty() || message.hostname.is_empty() {
        return Err("it has no namespace or no hostname".to_owned());
    }
    let addresses: Result<Vec<IpAddr>, String> =
        message.addresses.iter().map(virtual_address).collect();
    Ok(Service {
        key: format!("{}/{}", message.namespace, message.hostname).into(),
        name: message.name.into(),
        namespace: message.namespace.into(),
        hostname: message.hostname.into(),
        addresses: addresses?,
        ports: ports(&message.ports)?,
        balancing: message
            .load_balancing
            .map(balancing)
            .transpose()?
            .unwrap_or_default(),
    })
}

fn virtual_address(message: &NetworkAddress) -> Result<IpAddr, String> {
    let ip = address(&message.address)?;
    let whole = message.address.len() * 8;
    match message.length {
        Some(length) if usize::try_from(length) != Ok(whole) => {
            Err(format!("{ip}/{length} is not one address"))
        }
        _ => Ok(ip),
    }
}

/// Service port to target port.
fn ports(list: &[Port]) -> Result<BTreeMap<u16, u16>, String> {
    list.iter()
        .map(|port| Ok((self::port(port.service_port)?, target(port)?)))
        .collect()
}

/// An endpoint that does not say which of its own ports it means does not serve that port.
fn endpoint_ports(list: &[Port]) -> Result<BTreeMap<u16, u16>, String> {
    let mut ports = ports(list)?;
    ports.retain(|_, target| *target != 0);
    Ok(ports)
}

fn target(port: &Port) -> Result<u16, String> {
    // Services with named target ports leave it to their endpoints.
    match port.target_port {
        0 => Ok(0),
        target => self::port(target),
    }
}

/// Checks a port.
pub(super) fn port(number: u32) -> Result<u16, String> {
    match u16::try_from(number) {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(format!("{number} is no port")),
    }
}

/// Checks an address. An IPv4-mapped one is the IPv4 address that it stands for.
pub(super) fn address(bytes: &[u8]) -> Result<IpAddr, String> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(Ipv4Addr::from(v4).into());
    }
    let v6 = <[u8; 16]>::try_from(bytes);
    let v6 = v6.map_err(|_| format!("{} bytes are no address", bytes.len()))?;
    Ok(IpAddr::from(v6).to_canonical())
}

fn balancing(message: LoadBalancing) -> Result<Balancing, String> {
    let scopes: Result<Vec<Scope>, String> = message.routing_preference().map(scope).collect();
    let mode = message.mode();
    Ok(Balancing {
        // Without a mode the preference means nothing.
        preference: match mode {
            Mode::Strict | Mode::Failover => scopes?,
            Mode::UnspecifiedMode | Mode::Passthrough => Vec::new(),
        },
        strict: mode == Mode::Strict,
        allow_unhealthy: message.health_policy() == HealthPolicy::AllowAll,
    })
}

fn scope(scope: load_balancing::Scope) -> Result<Scope, String> {
    match scope {
        load_balancing::Scope::Region => Ok(Scope::Region),
        load_balancing::Scope::Zone => Ok(Scope::Zone),
        load_balancing::Scope::Subzone => Ok(Scope::Subzone),
        load_balancing::Scope::Node => Ok(Scope::Node),
        load_balancing::Scope::Cluster => Ok(Scope::Cluster),
        load_balancing::Scope::Network => Ok(Scope::Network),
        load_balancing::Scope::UnspecifiedScope => Err("a preference is not specified".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message;
    use protocol::workload::PortList;

    use super::*;

    fn own() -> TrustDomain {
        TrustDomain::new("td").unwrap()
    }

    fn message() -> wire::Workload {
        wire::Workload {
            uid: "uid".to_owned(),
            name: "web-1".to_owned(),
            namespace: "shop".to_owned(),
            service_account: "web".to_owned(),
            addresses: vec![vec![10, 0, 0, 1].into(), vec![0; 16].into()],
            tunnel_protocol: TunnelProtocol::Hbone.into(),
            services: [(
                "shop/web.shop.svc.cluster.local".to_owned(),
                PortList {
                    ports: vec![Port {
                        service_port: 80,
                        target_port: 8080,
                        app_protocol: 0,
                    }],
                },
            )]
            .into(),
            ..wire::Workload::default()
        }
    }

    #[test]
    fn a_workload_of_the_mesh_has_an_identity() {
        let parsed = workload(&own(), &mut Interner::default(), message()).unwrap();
        let identity = parsed.hbone.unwrap().to_string();
        assert_eq!(identity, "spiffe://td/ns/shop/sa/web");
        assert_eq!(
            parsed.addresses,
            ["10.0.0.1", "::"].map(|ip| ip.parse::<IpAddr>().unwrap())
        );
        let ports = &parsed.services["shop/web.shop.svc.cluster.local"];
        assert_eq!(*ports, BTreeMap::from([(80, 8080)]));
    }

    #[test]
    fn an_ipv4_mapped_address_is_the_ipv4_address() {
        let mapped = Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped();
        let read = address(&mapped.octets()).unwrap();
        assert_eq!(read, IpAddr::from([10, 0, 0, 1]));
    }

    #[test]
    fn a_port_without_a_target_is_not_served() {
        let mut message = message();
        for list in message.services.values_mut() {
            list.ports[0].target_port = 0;
        }
        let parsed = workload(&own(), &mut Interner::default(), message).unwrap();
        assert!(parsed.services.values().all(BTreeMap::is_empty));
    }

    #[test]
    fn a_workload_outside_the_mesh_needs_no_service_account() {
        let outside = wire::Workload {
            service_account: String::new(),
            tunnel_protocol: TunnelProtocol::None.into(),
            ..message()
        };
        assert_eq!(
            workload(&own(), &mut Interner::default(), outside)
                .unwrap()
                .hbone,
            None
        );
    }

    #[test]
    fn bad_workloads_are_refused() {
        let bad = [
            wire::Workload {
                uid: String::new(),
                ..message()
            },
            wire::Workload {
                service_account: String::new(),
                ..message()
            },
            wire::Workload {
                trust_domain: "no domain".to_owned(),
                ..message()
            },
            wire::Workload {
                addresses: vec![vec![1, 2, 3].into()],
                ..message()
            },
        ];
        for message in bad {
            assert!(
                workload(&own(), &mut Interner::default(), message.clone()).is_err(),
                "{message:?}"
            );
        }
    }

    #[test]
    fn a_service_with_a_range_of_addresses_is_refused() {
        let address = |length| NetworkAddress {
            address: vec![10, 96, 0, 0],
            length,
            ..NetworkAddress::default()
        };
        let message = |length| wire::Service {
            namespace: "shop".to_owned(),
            hostname: "web.shop.svc.cluster.local".to_owned(),
            addresses: vec![address(length)],
            ..wire::Service::default()
        };
        assert!(service(message(Some(16))).is_err());
        assert!(service(message(Some(32))).is_ok());
        let parsed = service(message(None)).unwrap();
        assert_eq!(&*parsed.key, "shop/web.shop.svc.cluster.local");
    }

    #[test]
    fn a_preference_counts_only_with_a_mode() {
        let message = |mode: Mode| LoadBalancing {
            routing_preference: vec![load_balancing::Scope::Zone.into()],
            mode: mode.into(),
            health_policy: HealthPolicy::AllowAll.into(),
        };
        let strict = balancing(message(Mode::Strict)).unwrap();
        assert!(strict.strict && strict.allow_unhealthy);
        assert_eq!(strict.preference, [Scope::Zone]);
        assert!(!balancing(message(Mode::Failover)).unwrap().strict);
        let none = balancing(message(Mode::UnspecifiedMode)).unwrap();
        assert!(none.preference.is_empty());
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parsers_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(message) = wire::Workload::decode(&*bytes) {
                let _ = workload(&own(), &mut Interner::default(), message);
            }
            if let Ok(message) = wire::Service::decode(&*bytes) {
                let _ = service(message);
            }
        }
    }
}
