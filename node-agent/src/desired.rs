//! From the spec, as people and the controller write it, to values that cannot be wrong. Pure; every
//! check of the spec is here.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crds::{AmbientNodeSpec, TunnelEndSpec, Workload, WorkloadNote, reasons};
use datapath::attachment::Attachment;
use datapath::input::{Marks, Ports, Proxy, Tunnel, TunnelEnd};
use datapath::names::Names;
use datapath::{FailureMode, Family, Mark, MeshPod, NodeInput, PerSlot, Slot, TunnelKind};
use ipnet::IpNet;

/// Bytes that geneve adds over IPv4: inner Ethernet, IP, UDP and geneve headers (RFC 8926).
const GENEVE_OVERHEAD_IPV4: u32 = 50;

/// Bytes that geneve adds over IPv6.
const GENEVE_OVERHEAD_IPV6: u32 = 70;

/// Inner network of IPv6 of the inbound tunnel, where the spec names none: unique-local (RFC 4193).
const INBOUND_IPV6: &str = "fd61:6d62:6974:126::/126";

/// That of the outbound tunnel.
const OUTBOUND_IPV6: &str = "fd61:6d62:6974:127::/126";

/// Largest virtual network identifier (RFC 8926: 24 bits).
const LAST_VNI: u32 = (1 << 24) - 1;

/// What the spec asks for, checked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Wanted {
    pub(crate) kind: TunnelKind,
    tunnel_port: u16,
    inbound: TunnelEnd,
    outbound: TunnelEnd,
    mtu: Option<u32>,
    pub(crate) ports: Ports,
    pub(crate) marks: Marks,
    pub(crate) failure_mode: FailureMode,
    pub(crate) local_by_tunnel: bool,
    pub(crate) pods: Vec<Pod>,
    /// Workloads that cannot be enrolled whatever the proxy does.
    pub(crate) unusable: Vec<WorkloadNote>,
    pub(crate) excluded: Vec<WorkloadNote>,
    /// Namespaces whose new pods wait for their enrolment.
    pub(crate) held_namespaces: BTreeSet<String>,
    /// UIDs of pods of these that need not wait.
    pub(crate) outside: BTreeSet<String>,
}

/// A pod to be carried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pod {
    pub(crate) workload: Workload,
    pub(crate) ips: Vec<IpAddr>,
}

/// A value of the spec that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("spec.{field}: {problem}")]
pub(crate) struct InvalidSpec {
    field: String,
    problem: String,
}

/// Checks a spec.
pub(crate) fn parse(spec: &AmbientNodeSpec) -> Result<Wanted, InvalidSpec> {
    let inbound = tunnel_end("tunnel.inbound", &spec.tunnel.inbound, INBOUND_IPV6)?;
    let outbound = tunnel_end("tunnel.outbound", &spec.tunnel.outbound, OUTBOUND_IPV6)?;
    distinct_tunnels(inbound, outbound)?;
    let (pods, unusable) = pods(&spec.workloads);
    Ok(Wanted {
        kind: match spec.tunnel.kind {
            crds::TunnelType::Geneve => TunnelKind::Geneve,
            crds::TunnelType::Veth => TunnelKind::Veth,
        },
        tunnel_port: spec.tunnel.port,
        inbound,
        outbound,
        mtu: spec.tunnel.mtu.map(u32::from),
        ports: ports(spec)?,
        marks: marks(spec)?,
        failure_mode: match spec.failure_mode {
            crds::FailureMode::Closed => FailureMode::Closed,
            crds::FailureMode::Open => FailureMode::Open,
        },
        local_by_tunnel: spec.local_traffic == crds::LocalTraffic::Hbone,
        pods,
        unusable,
        excluded: spec.excluded.clone(),
        held_namespaces: held_namespaces(spec),
        outside: spec.outside.iter().cloned().collect(),
    })
}

/// The data path's input, with the proxies that are attached and the pods whose turn it is.
pub(crate) fn input(
    names: &Names,
    wanted: &Wanted,
    proxies: &PerSlot<Option<Attachment>>,
    serving: Option<Slot>,
    pods: &[Pod],
    pod_devices: &BTreeSet<String>,
) -> NodeInput {
    let proxy = |attachment: &Attachment| Proxy {
        ends: attachment.ends,
        host_device: attachment.host_device.clone(),
        device: attachment.device.clone(),
        mtu: mtu(wanted, attachment),
        default_rp_filter: attachment.default_rp_filter.clone(),
    };
    NodeInput {
        names: names.clone(),
        tunnel: Tunnel {
            kind: wanted.kind,
            port: wanted.tunnel_port,
            inbound: wanted.inbound,
            outbound: wanted.outbound,
        },
        ports: wanted.ports,
        marks: wanted.marks,
        failure_mode: wanted.failure_mode,
        proxies: proxies
            .as_ref()
            .map(|attachment| attachment.as_ref().map(proxy)),
        serving,
        pods: pods
            .iter()
            .flat_map(|pod| pod.ips.iter().map(|ip| MeshPod { ip: *ip }))
            .collect(),
        pod_devices: pod_devices.clone(),
    }
}

/// Where pods may talk directly without a proxy, they may do so before they are enrolled.
fn held_namespaces(spec: &AmbientNodeSpec) -> BTreeSet<String> {
    match spec.failure_mode {
        crds::FailureMode::Closed => spec.mesh_namespaces.iter().cloned().collect(),
        crds::FailureMode::Open => BTreeSet::new(),
    }
}

fn mtu(wanted: &Wanted, proxy: &Attachment) -> u32 {
    let overhead = match (wanted.kind, proxy.ends.outer().proxy) {
        (TunnelKind::Geneve, IpAddr::V4(_)) => GENEVE_OVERHEAD_IPV4,
        (TunnelKind::Geneve, IpAddr::V6(_)) => GENEVE_OVERHEAD_IPV6,
        (TunnelKind::Veth, _) => 0,
    };
    wanted
        .mtu
        .unwrap_or_else(|| proxy.mtu.saturating_sub(overhead))
}

fn invalid(field: impl Into<String>, problem: impl ToString) -> InvalidSpec {
    InvalidSpec {
        field: field.into(),
        problem: problem.to_string(),
    }
}

fn tunnel_end(
    field: &str,
    spec: &TunnelEndSpec,
    default_ipv6: &str,
) -> Result<TunnelEnd, InvalidSpec> {
    if spec.vni == 0 || spec.vni > LAST_VNI {
        return Err(invalid(
            format!("{field}.vni"),
            format!("{} is not between 1 and {LAST_VNI}", spec.vni),
        ));
    }
    let network = |name: &str, text: &str, example: &str| {
        text.parse::<IpNet>().map_err(|_| {
            invalid(
                format!("{field}.{name}"),
                format!("{text:?} is not a network, for example {example}"),
            )
        })
    };
    let ipv6 = spec.ipv6_cidr.as_deref().unwrap_or(default_ipv6);
    let ipv4 = network("cidr", &spec.cidr, "192.168.126.0/30")?;
    let ipv6 = network("ipv6Cidr", ipv6, default_ipv6)?;
    let (IpNet::V4(ipv4), IpNet::V6(ipv6)) = (ipv4, ipv6) else {
        return Err(invalid(
            field,
            format!("cidr is of IPv4 and ipv6Cidr of IPv6, not {ipv4} and {ipv6}"),
        ));
    };
    TunnelEnd::new(spec.vni, ipv4, ipv6).map_err(|error| invalid(field, error))
}

fn distinct_tunnels(inbound: TunnelEnd, outbound: TunnelEnd) -> Result<(), InvalidSpec> {
    if inbound.vni == outbound.vni {
        return Err(invalid(
            "tunnel.outbound.vni",
            format!("{} is also the vni of tunnel.inbound", outbound.vni),
        ));
    }
    for (family, name) in [(Family::V4, "cidr"), (Family::V6, "ipv6Cidr")] {
        let network = |end: TunnelEnd| end.network(family).network();
        let (one, other) = (network(inbound), network(outbound));
        if one.contains(&other) || other.contains(&one) {
            return Err(invalid(
                format!("tunnel.outbound.{name}"),
                format!("{other} overlaps {one}, the {name} of tunnel.inbound"),
            ));
        }
    }
    Ok(())
}

fn ports(spec: &AmbientNodeSpec) -> Result<Ports, InvalidSpec> {
    let crds::PortsSpec {
        outbound,
        inbound,
        inbound_plaintext,
    } = spec.ports;
    let all = BTreeSet::from([outbound, inbound, inbound_plaintext]);
    if all.len() < 3 || all.contains(&0) {
        return Err(invalid(
            "ports",
            "the three ports must differ and must not be 0",
        ));
    }
    Ok(Ports {
        outbound,
        inbound,
        inbound_plaintext,
    })
}

fn marks(spec: &AmbientNodeSpec) -> Result<Marks, InvalidSpec> {
    let mark = |name: &str, text: &str| -> Result<Mark, InvalidSpec> {
        text.parse()
            .map_err(|error| invalid(format!("marks.{name}"), error))
    };
    let crds::MarksSpec {
        outbound,
        skip,
        proxied,
        proxied_second,
        own,
        return_,
        return_second,
        tproxy,
        proxy_return,
    } = &spec.marks;
    let marks = Marks {
        outbound: mark("outbound", outbound)?,
        skip: mark("skip", skip)?,
        proxied: PerSlot {
            first: mark("proxied", proxied)?,
            second: mark("proxiedSecond", proxied_second)?,
        },
        own: mark("own", own)?,
        return_: PerSlot {
            first: mark("return", return_)?,
            second: mark("returnSecond", return_second)?,
        },
        tproxy: mark("tproxy", tproxy)?,
        proxy_return: mark("proxyReturn", proxy_return)?,
    };
    marks.check().map_err(|error| invalid("marks", error))?;
    Ok(marks)
}

fn pods(workloads: &[Workload]) -> (Vec<Pod>, Vec<WorkloadNote>) {
    let (mut pods, mut unusable) = (Vec::new(), Vec::new());
    let mut uids = BTreeSet::new();
    for workload in workloads {
        if !uids.insert(workload.uid.as_str()) {
            unusable.push(note(
                workload,
                reasons::NOT_APPLIED,
                "a workload before it in spec.workloads has the same UID: leave the list to ambit-controller",
            ));
            continue;
        }
        // A value that is no address the API server has refused already.
        let ips: BTreeSet<IpAddr> = workload
            .ips
            .iter()
            .filter_map(|ip| ip.parse().ok())
            .collect();
        if ips.is_empty() {
            unusable.push(note(
                workload,
                reasons::NO_ADDRESS,
                format!("its addresses are {:?}: none can be used", workload.ips),
            ));
        } else {
            pods.push(Pod {
                workload: workload.clone(),
                ips: ips.into_iter().collect(),
            });
        }
    }
    (pods, unusable)
}

/// A note about a workload.
pub(crate) fn note(workload: &Workload, reason: &str, message: impl Into<String>) -> WorkloadNote {
    WorkloadNote {
        uid: workload.uid.clone(),
        namespace: workload.namespace.clone(),
        name: workload.name.clone(),
        reason: reason.to_owned(),
        message: message.into(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use datapath::input::{Ends, Pair};
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn workload(uid: &str, ip: &str) -> Workload {
        Workload {
            uid: uid.to_owned(),
            namespace: "shop".to_owned(),
            name: format!("pod-{uid}"),
            service_account: "default".to_owned(),
            ips: vec![ip.to_owned()],
        }
    }

    pub(crate) fn spec(workloads: Vec<Workload>) -> AmbientNodeSpec {
        AmbientNodeSpec {
            workloads,
            ..AmbientNodeSpec::default()
        }
    }

    #[test]
    fn the_marks_of_an_object_that_names_none_are_the_data_paths_own() {
        assert_eq!(parse(&spec(Vec::new())).unwrap().marks, Marks::default());
    }

    fn attachment() -> Attachment {
        Attachment {
            ends: Ends::V4(Pair {
                proxy: Ipv4Addr::new(10, 0, 0, 3),
                host: Ipv4Addr::new(10, 0, 0, 1),
            }),
            device: "eth0".to_owned(),
            host_device: "vethp".to_owned(),
            mtu: 1500,
            default_rp_filter: "0".to_owned(),
        }
    }

    #[test]
    fn the_default_spec_is_valid() {
        let wanted = parse(&spec(vec![workload("a", "10.0.0.4")])).unwrap();
        assert_eq!(wanted.pods.len(), 1);
        assert!(wanted.unusable.is_empty());
    }

    #[test]
    fn of_workloads_of_one_uid_the_first_counts_and_the_others_are_told() {
        let wanted = parse(&spec(vec![
            workload("uid-a", "10.0.0.1"),
            workload("uid-a", "10.0.0.2"),
            workload("uid-b", "10.0.0.3"),
        ]))
        .unwrap();
        let ips: Vec<_> = wanted.pods.iter().flat_map(|pod| &pod.ips).collect();
        let of = |text: &str| text.parse::<IpAddr>().unwrap();
        assert_eq!(ips, [&of("10.0.0.1"), &of("10.0.0.3")]);
        let reasons: Vec<_> = wanted.unusable.iter().map(|it| &it.reason).collect();
        assert_eq!(reasons, [reasons::NOT_APPLIED]);
    }

    #[test]
    fn geneve_leaves_room_for_its_headers_and_veth_needs_none() {
        let mut geneve = spec(vec![]);
        let mut attachment = attachment();
        let mtu = |spec: &AmbientNodeSpec, attachment: &Attachment| {
            input(
                &Names::default(),
                &parse(spec).unwrap(),
                &PerSlot {
                    first: Some(attachment.clone()),
                    second: None,
                },
                Some(Slot::First),
                &[],
                &BTreeSet::new(),
            )
            .proxies
            .first
            .unwrap()
            .mtu
        };
        let input_of = |spec: &AmbientNodeSpec| mtu(spec, &attachment);
        assert_eq!(input_of(&geneve), 1450);
        geneve.tunnel.mtu = Some(1400);
        assert_eq!(input_of(&geneve), 1400);
        let mut veth = spec(vec![]);
        veth.tunnel.kind = crds::TunnelType::Veth;
        assert_eq!(input_of(&veth), 1500);
        attachment.ends = Ends::V6(Pair {
            proxy: Ipv6Addr::LOCALHOST,
            host: Ipv6Addr::LOCALHOST,
        });
        assert_eq!(mtu(&spec(vec![]), &attachment), 1430);
    }

    #[test]
    fn an_invalid_spec_names_the_field() {
        type Change = fn(&mut AmbientNodeSpec);
        let cases: [(Change, &str); 9] = [
            (
                |spec| spec.tunnel.inbound.vni = 1 << 24,
                "spec.tunnel.inbound.vni:",
            ),
            (
                |spec| spec.tunnel.outbound.vni = 1000,
                "spec.tunnel.outbound.vni:",
            ),
            (
                |spec| spec.tunnel.inbound.cidr = "fd00::/64".to_owned(),
                "spec.tunnel.inbound: cidr is of IPv4",
            ),
            (
                |spec| spec.tunnel.inbound.ipv6_cidr = Some("fd00::/127".to_owned()),
                "spec.tunnel.inbound: fd00::/127 has no room",
            ),
            (
                |spec| spec.tunnel.inbound.ipv6_cidr = Some("fd61:6d62:6974::/48".to_owned()),
                "spec.tunnel.outbound.ipv6Cidr:",
            ),
            (
                |spec| spec.tunnel.outbound.cidr = "192.168.126.0/24".to_owned(),
                "spec.tunnel.outbound.cidr:",
            ),
            (|spec| spec.ports.inbound = 15001, "spec.ports:"),
            (
                |spec| spec.marks.return_ = "0x40".to_owned(),
                "spec.marks.return:",
            ),
            (
                |spec| spec.marks.own = "0x320/0x320".to_owned(),
                "spec.marks: own",
            ),
        ];
        for (break_it, start) in cases {
            let mut broken = spec(vec![]);
            break_it(&mut broken);
            let message = parse(&broken).unwrap_err().to_string();
            assert!(message.starts_with(start), "{message}");
        }
    }

    #[test]
    fn a_workload_without_an_address_is_named_and_the_others_go_on() {
        let wanted = parse(&spec(vec![
            workload("a", "nowhere"),
            workload("b", "10.0.0.5"),
            workload("c", "fd00::4"),
        ]))
        .unwrap();
        assert_eq!(wanted.pods[0].workload.uid, "b");
        assert_eq!(wanted.pods[1].workload.uid, "c");
        assert_eq!(wanted.unusable[0].reason, reasons::NO_ADDRESS);
    }

    proptest! {
        #[test]
        fn no_spec_makes_the_parser_panic(
            vni in any::<u32>(), cidr in ".{0,20}", ipv6_cidr in prop::option::of(".{0,20}"), mark in ".{0,22}", port in any::<u16>(),
            ips in prop::collection::vec(".{0,16}", 0..3),
        ) {
            let mut spec = spec(vec![Workload { ips, ..workload("a", "") }]);
            spec.tunnel.inbound = TunnelEndSpec { vni, cidr, ipv6_cidr };
            spec.marks.skip = mark;
            spec.ports.inbound = port;
            let _ = parse(&spec);
        }
    }
}
