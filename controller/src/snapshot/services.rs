//! Plain copies of Services and EndpointSlices; only what TCP needs.

use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use protocol::workload::{AppProtocol, IpFamilies};

use super::objects::{address, label};
use crate::names::{NodeName, PodKey, PodUid, ServiceKey, SliceKey};

/// Label of an EndpointSlice that names its Service.
const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// Which endpoints of a Service a client prefers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Preference {
    #[default]
    None,
    SameZone,
    SameNode,
    /// `internalTrafficPolicy: Local`: no others.
    OnlySameNode,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Service {
    pub(crate) key: ServiceKey,
    /// None of them if it is headless.
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) ports: Vec<ServicePort>,
    pub(crate) families: IpFamilies,
    pub(crate) preference: Preference,
    pub(crate) publish_not_ready: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServicePort {
    pub(crate) name: Arc<str>,
    pub(crate) port: u16,
    /// Unknown if it is the name of a container's port: pods may differ.
    pub(crate) target: Option<u16>,
    pub(crate) app_protocol: AppProtocol,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EndpointSlice {
    pub(crate) key: SliceKey,
    pub(crate) service: ServiceKey,
    pub(crate) ports: Vec<EndpointPort>,
    pub(crate) endpoints: Vec<Endpoint>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EndpointPort {
    /// Of the Service's port.
    pub(crate) name: Arc<str>,
    pub(crate) port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Endpoint {
    pub(crate) addresses: Vec<IpAddr>,
    /// The pod behind it, if the slice names one.
    pub(crate) pod: Option<TargetPod>,
    pub(crate) ready: bool,
    pub(crate) node: Option<NodeName>,
    pub(crate) zone: Option<Arc<str>>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TargetPod {
    pub(crate) key: PodKey,
    pub(crate) uid: Option<PodUid>,
}

// === impl Service ===

impl Service {
    /// `None` for one that only renames a host outside the cluster.
    pub(crate) fn parse(service: &core::Service) -> Option<Self> {
        let spec = service.spec.as_ref()?;
        if spec.type_.as_deref() == Some("ExternalName") {
            return None;
        }
        let addresses: Vec<IpAddr> = spec
            .cluster_ips
            .iter()
            .flatten()
            .filter_map(|ip| address(ip))
            .collect();
        Some(Self {
            key: ServiceKey::new(
                service.metadata.namespace.as_deref()?,
                service.metadata.name.as_deref()?,
            ),
            addresses,
            ports: spec
                .ports
                .iter()
                .flatten()
                .filter(|port| is_tcp(port.protocol.as_deref()))
                .filter_map(ServicePort::parse)
                .collect(),
            families: families(spec),
            preference: preference(spec),
            publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
        })
    }
}

impl ServicePort {
    fn parse(port: &core::ServicePort) -> Option<Self> {
        let number = u16::try_from(port.port).ok()?;
        let name = port.name.as_deref().unwrap_or_default();
        Some(Self {
            name: name.into(),
            port: number,
            target: match &port.target_port {
                None => Some(number),
                Some(IntOrString::Int(target)) => u16::try_from(*target).ok(),
                Some(IntOrString::String(text)) => text.parse().ok(),
            },
            app_protocol: app_protocol(port.app_protocol.as_deref(), name),
        })
    }
}

/// By the port's `appProtocol`, else by the field's convention: the first part of its name.
fn app_protocol(declared: Option<&str>, port_name: &str) -> AppProtocol {
    let text = declared.unwrap_or_else(|| port_name.split('-').next().unwrap_or_default());
    match text.to_ascii_lowercase().as_str() {
        "http" | "kubernetes.io/ws" => AppProtocol::Http11,
        "http2" | "h2c" | "kubernetes.io/h2c" => AppProtocol::Http2,
        "grpc" => AppProtocol::Grpc,
        "tls" | "https" | "kubernetes.io/wss" => AppProtocol::Tls,
        "tcp" => AppProtocol::Tcp,
        _ => AppProtocol::Unknown,
    }
}

fn families(spec: &core::ServiceSpec) -> IpFamilies {
    let has = |family: &str| spec.ip_families.iter().flatten().any(|f| f == family);
    match (has("IPv4"), has("IPv6")) {
        (true, true) => IpFamilies::Dual,
        (true, false) => IpFamilies::Ipv4Only,
        (false, true) => IpFamilies::Ipv6Only,
        (false, false) => IpFamilies::Automatic,
    }
}

fn preference(spec: &core::ServiceSpec) -> Preference {
    if spec.internal_traffic_policy.as_deref() == Some("Local") {
        return Preference::OnlySameNode;
    }
    match spec.traffic_distribution.as_deref() {
        Some("PreferClose" | "PreferSameZone") => Preference::SameZone,
        Some("PreferSameNode") => Preference::SameNode,
        _ => Preference::None,
    }
}

fn is_tcp(protocol: Option<&str>) -> bool {
    matches!(protocol, None | Some("TCP"))
}

// === impl EndpointSlice ===

impl EndpointSlice {
    /// `None` for one that belongs to no Service, or holds names instead of addresses.
    pub(crate) fn parse(slice: &discovery::EndpointSlice) -> Option<Self> {
        let meta = &slice.metadata;
        if slice.address_type == "FQDN" {
            return None;
        }
        let namespace = meta.namespace.as_deref()?;
        Some(Self {
            key: SliceKey::new(namespace, meta.name.as_deref()?),
            service: ServiceKey::new(namespace, label(meta, SERVICE_NAME_LABEL)?),
            ports: slice
                .ports
                .iter()
                .flatten()
                .filter(|port| is_tcp(port.protocol.as_deref()))
                .filter_map(|port| {
                    Some(EndpointPort {
                        name: port.name.as_deref().unwrap_or_default().into(),
                        port: u16::try_from(port.port?).ok()?,
                    })
                })
                .collect(),
            endpoints: slice
                .endpoints
                .iter()
                .map(|endpoint| Endpoint::parse(endpoint, namespace))
                .collect(),
        })
    }
}

impl Endpoint {
    fn parse(endpoint: &discovery::Endpoint, namespace: &str) -> Self {
        let target = endpoint.target_ref.as_ref();
        Self {
            addresses: endpoint
                .addresses
                .iter()
                .filter_map(|ip| address(ip))
                .collect(),
            pod: target
                .filter(|target| target.kind.as_deref() == Some("Pod"))
                .and_then(|target| {
                    Some(TargetPod {
                        key: PodKey::new(
                            target.namespace.as_deref().unwrap_or(namespace),
                            target.name.as_deref()?,
                        ),
                        uid: target.uid.as_deref().map(Into::into),
                    })
                }),
            // Unknown means ready (the API's own words).
            ready: endpoint
                .conditions
                .as_ref()
                .and_then(|conditions| conditions.ready)
                .unwrap_or(true),
            node: endpoint.node_name.as_deref().map(Into::into),
            zone: endpoint.zone.as_deref().map(Into::into),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn service(spec: Value) -> Option<Service> {
        let object = json!({"metadata": {"name": "web", "namespace": "shop"}, "spec": spec});
        Service::parse(&serde_json::from_value(object).unwrap())
    }

    fn slice(change: impl Fn(&mut Value)) -> Option<EndpointSlice> {
        let mut object = json!({
            "metadata": {
                "name": "web-x", "namespace": "shop",
                "labels": {"kubernetes.io/service-name": "web"},
            },
            "addressType": "IPv4",
            "ports": [
                {"name": "http", "port": 8080, "protocol": "TCP"},
                {"name": "dns", "port": 53, "protocol": "UDP"},
            ],
            "endpoints": [
                {"addresses": ["10.0.0.1"], "conditions": {"ready": false},
                 "targetRef": {"kind": "Pod", "name": "web-1", "namespace": "shop", "uid": "u1"}},
                {"addresses": ["10.0.0.2"], "zone": "z1"},
            ],
        });
        change(&mut object);
        EndpointSlice::parse(&serde_json::from_value(object).unwrap())
    }

    #[test]
    fn only_tcp_ports_matter_and_named_targets_are_open() {
        let service = service(json!({
            "clusterIPs": ["::ffff:10.96.0.1", "fd00::1"],
            "ipFamilies": ["IPv4", "IPv6"],
            "ports": [
                {"name": "http", "port": 80, "targetPort": "web"},
                {"name": "grpc-api", "port": 81, "targetPort": 8081},
                {"name": "plain", "port": 82, "appProtocol": "kubernetes.io/h2c"},
                {"name": "dns", "port": 53, "protocol": "UDP"},
            ],
        }))
        .unwrap();
        let ports: Vec<_> = service
            .ports
            .iter()
            .map(|port| (port.port, port.target, port.app_protocol))
            .collect();
        assert_eq!(
            ports,
            [
                (80, None, AppProtocol::Http11),
                (81, Some(8081), AppProtocol::Grpc),
                (82, Some(82), AppProtocol::Http2),
            ]
        );
        assert_eq!(service.families, IpFamilies::Dual);
        let addresses = ["10.96.0.1", "fd00::1"].map(|ip| ip.parse::<IpAddr>().unwrap());
        assert_eq!(service.addresses, addresses);
    }

    #[test]
    fn a_headless_service_has_no_address_and_an_external_name_is_none() {
        let headless = service(json!({"clusterIPs": ["None"], "clusterIP": "None"}));
        assert!(headless.unwrap().addresses.is_empty());
        let external = service(json!({"type": "ExternalName", "externalName": "example.org"}));
        assert_eq!(external, None);
    }

    #[test]
    fn preferences_are_read() {
        for (spec, expected) in [
            (
                json!({"trafficDistribution": "PreferClose"}),
                Preference::SameZone,
            ),
            (
                json!({"trafficDistribution": "PreferSameNode"}),
                Preference::SameNode,
            ),
            (
                json!({"internalTrafficPolicy": "Local"}),
                Preference::OnlySameNode,
            ),
            (json!({}), Preference::None),
        ] {
            assert_eq!(service(spec).unwrap().preference, expected);
        }
    }

    #[test]
    fn a_slice_is_read_with_its_pods_and_readiness() {
        let slice = slice(|_| {}).unwrap();
        assert_eq!(slice.service, ServiceKey::new("shop", "web"));
        assert_eq!(slice.ports.len(), 1);
        let [pod, other] = slice.endpoints.as_slice() else {
            panic!("{:?}", slice.endpoints);
        };
        assert_eq!(pod.pod.as_ref().unwrap().key, PodKey::new("shop", "web-1"));
        assert!(!pod.ready);
        assert!(other.pod.is_none() && other.ready);
        assert_eq!(other.zone.as_deref(), Some("z1"));
    }

    #[test]
    fn a_slice_of_ipv6_is_read() {
        let slice = slice(|object| {
            object["addressType"] = json!("IPv6");
            object["endpoints"][0]["addresses"] = json!(["fd00::1"]);
        });
        let first = &slice.unwrap().endpoints[0];
        assert_eq!(first.addresses, ["fd00::1".parse::<IpAddr>().unwrap()]);
        assert_eq!(
            first.pod.as_ref().unwrap().key,
            PodKey::new("shop", "web-1")
        );
    }

    #[test]
    fn slices_of_names_or_of_no_service_are_left_out() {
        assert_eq!(slice(|object| object["addressType"] = json!("FQDN")), None);
        assert_eq!(
            slice(|object| object["metadata"]["labels"] = json!({})),
            None
        );
    }
}
