//! Pure: a Service as a service of discovery.

use protocol::workload::load_balancing::{HealthPolicy, Mode, Scope};
use protocol::workload::{self as proto, LoadBalancing, NetworkAddress};

use super::workload::octets;
use super::{Facts, hostname};
use crate::snapshot::services::{Preference, Service};

pub(super) fn of_service(facts: &Facts, service: &Service) -> proto::Service {
    proto::Service {
        name: service.key.name.to_string(),
        namespace: service.key.namespace.to_string(),
        hostname: hostname(facts, &service.key),
        addresses: service
            .addresses
            .iter()
            .map(|address| NetworkAddress {
                network: String::new(),
                address: octets(address).to_vec(),
                length: None,
            })
            .collect(),
        ports: service
            .ports
            .iter()
            .map(|port| proto::Port {
                service_port: u32::from(port.port),
                // 0: it differs from workload to workload, which say it themselves.
                target_port: port.target.map(u32::from).unwrap_or_default(),
                app_protocol: port.app_protocol.into(),
            })
            .collect(),
        load_balancing: load_balancing(service),
        ip_families: service.families.into(),
        canonical: true,
        ..proto::Service::default()
    }
}

fn load_balancing(service: &Service) -> Option<LoadBalancing> {
    let (scopes, mode): (&[Scope], Mode) = match service.preference {
        Preference::None => (&[], Mode::UnspecifiedMode),
        Preference::SameZone => (
            &[Scope::Network, Scope::Region, Scope::Zone],
            Mode::Failover,
        ),
        Preference::SameNode => (
            &[
                Scope::Network,
                Scope::Region,
                Scope::Zone,
                Scope::Subzone,
                Scope::Node,
            ],
            Mode::Failover,
        ),
        Preference::OnlySameNode => (&[Scope::Node], Mode::Strict),
    };
    if scopes.is_empty() && !service.publish_not_ready {
        return None;
    }
    let health_policy = if service.publish_not_ready {
        HealthPolicy::AllowAll
    } else {
        HealthPolicy::OnlyHealthy
    };
    Some(LoadBalancing {
        routing_preference: scopes.iter().map(|scope| i32::from(*scope)).collect(),
        mode: mode.into(),
        health_policy: health_policy.into(),
    })
}
