//! Pure: a pod, or an endpoint without one, as a workload of discovery.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use prost::bytes::Bytes;
use protocol::workload::{self as proto, NetworkMode, TunnelProtocol, WorkloadStatus};

use super::{Facts, endpoint_name, service_name};
use crate::desired::enrolment::{Enrolment, address_holder, enrolment};
use crate::names::ResourceName;
use crate::snapshot::objects::{Locality, Pod};
use crate::snapshot::services::{Endpoint, EndpointSlice};
use crate::snapshot::{ClusterSnapshot, EndpointKey};

/// Ports of a workload by the service that they belong to.
type Services = BTreeMap<String, proto::PortList>;

/// `None` for a pod that has ended or has no address that is its own.
pub(super) fn of_pod(
    facts: &Facts,
    snapshot: &ClusterSnapshot,
    pod: &Pod,
) -> Option<proto::Workload> {
    if pod.terminal {
        return None;
    }
    let addresses: Vec<IpAddr> = pod
        .ips
        .iter()
        .copied()
        .filter(|address| pod.host_network || holds(snapshot, pod, *address))
        .collect();
    if addresses.is_empty() {
        return None;
    }
    let tunnel = match enrolment(snapshot, &facts.rules, pod) {
        Enrolment::Enrolled => TunnelProtocol::Hbone,
        Enrolment::NotAsked | Enrolment::Excluded(_) => TunnelProtocol::None,
    };
    let healthy = pod.ready && !pod.terminating;
    let node = pod.node.as_ref();
    let locality = node
        .and_then(|name| snapshot.node(name))
        .map(|node| locality(&node.locality));
    Some(proto::Workload {
        uid: pod.uid.to_string(),
        name: pod.key.name.to_string(),
        namespace: pod.key.namespace.to_string(),
        addresses: addresses.iter().map(octets).collect(),
        tunnel_protocol: tunnel.into(),
        trust_domain: facts.trust_domain.clone(),
        service_account: pod.service_account.to_string(),
        node: node.map(ToString::to_string).unwrap_or_default(),
        canonical_name: pod.canonical_name.to_string(),
        canonical_revision: pod.canonical_revision.to_string(),
        workload_type: pod.owner.kind.into(),
        workload_name: pod.owner.name.to_string(),
        status: status(healthy).into(),
        cluster_id: facts.cluster_id.clone(),
        services: services_of_pod(facts, snapshot, pod, &addresses, healthy),
        locality,
        network_mode: if pod.host_network {
            NetworkMode::HostNetwork.into()
        } else {
            NetworkMode::Standard.into()
        },
        ..proto::Workload::default()
    })
}

/// `None` if a pod holds the address: then the pod's workload has the service. Of endpoints that share the
/// address a ready one counts, whatever their order.
pub(super) fn of_endpoint(
    facts: &Facts,
    snapshot: &ClusterSnapshot,
    key: &EndpointKey,
) -> Option<proto::Workload> {
    let slice = snapshot.slice(&key.slice)?;
    let endpoint = slice
        .endpoints
        .iter()
        .filter(|endpoint| endpoint.pod.is_none() && endpoint.addresses.contains(&key.address))
        .min_by_key(|endpoint| (!endpoint.ready, *endpoint))?;
    if address_holder(snapshot, key.address).is_some_and(|pod| !pod.terminal) {
        return None;
    }
    let mut services = Services::new();
    add_service(facts, snapshot, slice, &mut services);
    let zone = endpoint.zone.as_deref().map(|zone| proto::Locality {
        zone: zone.to_owned(),
        ..proto::Locality::default()
    });
    let node = endpoint.node.as_ref();
    Some(proto::Workload {
        uid: endpoint_name(facts, key).to_string(),
        name: key.slice.name.to_string(),
        namespace: key.slice.namespace.to_string(),
        addresses: vec![octets(&key.address)],
        trust_domain: facts.trust_domain.clone(),
        node: node.map(ToString::to_string).unwrap_or_default(),
        canonical_name: slice.service.name.to_string(),
        canonical_revision: "latest".to_owned(),
        workload_type: proto::WorkloadType::Pod.into(),
        workload_name: key.slice.name.to_string(),
        status: status(endpoint.ready).into(),
        cluster_id: facts.cluster_id.clone(),
        services,
        locality: zone,
        ..proto::Workload::default()
    })
}

/// An address as the wire has it.
pub(super) fn octets(address: &IpAddr) -> Bytes {
    match address {
        IpAddr::V4(v4) => Bytes::copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => Bytes::copy_from_slice(&v6.octets()),
    }
}

fn holds(snapshot: &ClusterSnapshot, pod: &Pod, address: IpAddr) -> bool {
    address_holder(snapshot, address).is_some_and(|holder| holder.uid == pod.uid)
}

fn services_of_pod(
    facts: &Facts,
    snapshot: &ClusterSnapshot,
    pod: &Pod,
    addresses: &[IpAddr],
    healthy: bool,
) -> Services {
    // An endpoint that is not ready although its pod is does not count; one whose pod is not
    // ready either does, for services that publish such endpoints.
    let counts = |endpoint: &&Endpoint| endpoint.ready || !healthy;
    let mut services = Services::new();
    for slice in snapshot.slices_of_pod(&pod.key) {
        let endpoints = slice.endpoints.iter().filter(counts);
        if endpoints
            .filter_map(|endpoint| endpoint.pod.as_ref())
            .any(|target| {
                target.key == pod.key && target.uid.as_ref().is_none_or(|uid| *uid == pod.uid)
            })
        {
            add_service(facts, snapshot, slice, &mut services);
        }
    }
    if pod.host_network {
        return services;
    }
    for address in addresses {
        for slice in snapshot.slices_of_address(*address) {
            let endpoints = slice.endpoints.iter().filter(counts);
            if endpoints
                .filter(|endpoint| endpoint.pod.is_none())
                .any(|endpoint| endpoint.addresses.contains(address))
            {
                add_service(facts, snapshot, slice, &mut services);
            }
        }
    }
    services
}

/// The slice's ports, each with the port of the Service by its name. A named target port has its
/// number in the slice.
fn add_service(
    facts: &Facts,
    snapshot: &ClusterSnapshot,
    slice: &EndpointSlice,
    services: &mut Services,
) {
    let Some(service) = snapshot.service(&slice.service) else {
        return;
    };
    let name: ResourceName = service_name(facts, &slice.service);
    let known = services.entry(name.to_string()).or_default();
    let pairs: BTreeSet<(u32, u32, i32)> = known
        .ports
        .iter()
        .map(|port| (port.service_port, port.target_port, port.app_protocol))
        .chain(service.ports.iter().flat_map(|port| {
            let targets = slice.ports.iter().filter(|target| target.name == port.name);
            targets.map(|target| {
                (
                    u32::from(port.port),
                    u32::from(target.port),
                    i32::from(port.app_protocol),
                )
            })
        }))
        .collect();
    known.ports = pairs
        .into_iter()
        .map(|(service_port, target_port, app_protocol)| proto::Port {
            service_port,
            target_port,
            app_protocol,
        })
        .collect();
}

fn status(healthy: bool) -> WorkloadStatus {
    if healthy {
        WorkloadStatus::Healthy
    } else {
        WorkloadStatus::Unhealthy
    }
}

fn locality(locality: &Locality) -> proto::Locality {
    proto::Locality {
        region: locality.region.clone(),
        zone: locality.zone.clone(),
        subzone: locality.subzone.clone(),
    }
}
