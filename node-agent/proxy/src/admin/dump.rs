//! The field's form of a dump, as its tools read it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hbone::Shared;
use hbone::certificates::{Described, State};
use hbone::directory::{Directory, Service, Workload};
use hbone::identity::{SpiffeId, TrustDomain};
use hbone::policy::{Match, Policy, PolicyAction, PolicyScope, Text};
use ipnet::IpNet;
use jiff::Timestamp;
use serde_json::{Value, json};

/// Everything.
pub(crate) fn build(shared: &Shared, node: &str) -> Value {
    let directory = shared.directory.load_full();
    let trust_domain = &shared.settings.trust_domain;
    let mut local: Vec<_> = shared.local.load().iter().cloned().collect();
    local.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    let states = shared.certificates.states();
    let now = SystemTime::now();
    json!({
        "version": {"version": env!("CARGO_PKG_VERSION")},
        "config": {
            "localNode": node,
            "clusterId": shared.settings.cluster,
            "trustDomain": trust_domain.as_str(),
        },
        "workloads": sorted(directory.workloads().map(|w| (w.uid.clone(), workload(trust_domain, w)))),
        "services": sorted(directory.services().map(|s| (s.key.clone(), service(&directory, s)))),
        "policies": sorted(directory.policies().map(|(name, p)| (name.clone(), policy(name, p)))),
        "certificates": states
            .iter()
            .map(|(identity, state)| certificate(identity, state, now))
            .collect::<Vec<_>>(),
        "localWorkloads": local
            .iter()
            .map(|pod| json!({
                "uid": *pod.uid,
                "namespace": *pod.namespace,
                "name": *pod.name,
                "identity": pod.identity.to_string(),
                "ips": pod.addresses,
            }))
            .collect::<Vec<_>>(),
        "connections": shared.connections(),
        "tunnels": shared.tunnels(),
        "discovered": *shared.discovered().borrow(),
    })
}

fn sorted(items: impl Iterator<Item = (Arc<str>, Value)>) -> Vec<Value> {
    let all: BTreeMap<Arc<str>, Value> = items.collect();
    all.into_values().collect()
}

fn workload(own: &TrustDomain, workload: &Workload) -> Value {
    let trust_domain = workload.hbone.as_ref().map_or(own, SpiffeId::trust_domain);
    json!({
        "uid": *workload.uid,
        "name": *workload.name,
        "namespace": *workload.namespace,
        "workloadIps": workload.addresses,
        "protocol": if workload.hbone.is_some() { "HBONE" } else { "TCP" },
        "trustDomain": trust_domain.as_str(),
        "serviceAccount": *workload.service_account,
        "workloadName": *workload.workload_name,
        "workloadType": workload.workload_type,
        "canonicalName": *workload.canonical_name,
        "canonicalRevision": *workload.canonical_revision,
        "clusterId": *workload.cluster,
        "node": *workload.node,
        "network": *workload.network,
        "networkMode": if workload.host_network { "HostNetwork" } else { "Standard" },
        "status": if workload.healthy { "Healthy" } else { "Unhealthy" },
        "locality": {
            "region": *workload.locality.region,
            "zone": *workload.locality.zone,
            "subzone": *workload.locality.subzone,
        },
        "services": workload.services.keys().map(|key| &**key).collect::<Vec<_>>(),
        "authorizationPolicies": workload.policies.iter().map(|name| &**name).collect::<Vec<_>>(),
    })
}

fn service(directory: &Directory, service: &Service) -> Value {
    let endpoints: BTreeMap<String, Value> = directory
        .endpoints(&service.key)
        .map(|workload| {
            let ports = workload.services.get(&service.key);
            let endpoint = json!({
                "workloadUid": *workload.uid,
                "port": ports.map(ports_by_name),
                "status": if workload.healthy { "Healthy" } else { "Unhealthy" },
            });
            (workload.uid.to_string(), endpoint)
        })
        .collect();
    let vip = |ip: &IpAddr| format!("/{ip}");
    json!({
        "name": *service.name,
        "namespace": *service.namespace,
        "hostname": *service.hostname,
        "vips": service.addresses.iter().map(vip).collect::<Vec<_>>(),
        "ports": ports_by_name(&service.ports),
        "endpoints": endpoints,
        "subjectAltNames": [],
    })
}

/// JSON has only texts as keys.
fn ports_by_name(ports: &BTreeMap<u16, u16>) -> BTreeMap<String, u16> {
    ports
        .iter()
        .map(|(port, target)| (port.to_string(), *target))
        .collect()
}

fn certificate(identity: &SpiffeId, state: &State, now: SystemTime) -> Value {
    let available = state.valid(now).is_some();
    let words = match (available, &state.error) {
        (true, _) => "Available".to_owned(),
        (false, None) => "Initializing".to_owned(),
        (false, Some(error)) => format!("Unavailable: {error}"),
    };
    let (chain, roots) = match &state.certificate {
        Some(certificate) => (&*certificate.chain, &*certificate.roots),
        None => (&[][..], &[][..]),
    };
    json!({
        "identity": identity.to_string(),
        "state": words,
        "error": state.error,
        "certChain": chain.iter().map(described).collect::<Vec<_>>(),
        "rootCerts": roots.iter().map(described).collect::<Vec<_>>(),
    })
}

fn described(certificate: &Described) -> Value {
    let time = |time: SystemTime| Timestamp::try_from(time).ok().map(|time| time.to_string());
    json!({
        // The field's tools decode once to get the PEM file.
        "pem": STANDARD.encode(pem(&certificate.der)),
        "serialNumber": certificate.serial,
        "validFrom": time(certificate.not_before),
        "expirationTime": time(certificate.not_after),
    })
}

fn pem(der: &[u8]) -> String {
    let mut pem = "-----BEGIN CERTIFICATE-----\n".to_owned();
    let text = STANDARD.encode(der);
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, more) = rest.split_at(rest.len().min(64));
        pem.push_str(line);
        pem.push('\n');
        rest = more;
    }
    pem + "-----END CERTIFICATE-----\n"
}

fn policy(name: &str, policy: &Policy) -> Value {
    json!({
        "name": name.rsplit('/').next(),
        "namespace": *policy.namespace,
        "scope": match policy.scope {
            PolicyScope::Global => "Global",
            PolicyScope::Namespace => "Namespace",
            PolicyScope::Selected => "WorkloadSelector",
        },
        "action": match policy.action {
            PolicyAction::Allow => "Allow",
            PolicyAction::Deny => "Deny",
        },
        "dryRun": policy.dry_run,
        "rules": policy
            .rules
            .iter()
            .map(|rule| rule.iter().map(|clause| clause.iter().map(one_match).collect()).collect())
            .collect::<Vec<Vec<Vec<Value>>>>(),
    })
}

fn one_match(one: &Match) -> Value {
    let texts = |list: &[Text]| list.iter().map(text).collect::<Vec<_>>();
    let nets = |list: &[IpNet]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
    let accounts = |list: &[(String, String)]| {
        list.iter()
            .map(|(namespace, name)| format!("{namespace}/{name}"))
            .collect::<Vec<_>>()
    };
    let fields = json!({
        "namespaces": texts(&one.namespaces),
        "notNamespaces": texts(&one.not_namespaces),
        "principals": texts(&one.principals),
        "notPrincipals": texts(&one.not_principals),
        "sourceIps": nets(&one.source_ips),
        "notSourceIps": nets(&one.not_source_ips),
        "destinationIps": nets(&one.destination_ips),
        "notDestinationIps": nets(&one.not_destination_ips),
        "destinationPorts": one.destination_ports,
        "notDestinationPorts": one.not_destination_ports,
        "serviceAccounts": accounts(&one.service_accounts),
        "notServiceAccounts": accounts(&one.not_service_accounts),
    });
    let Value::Object(fields) = fields else {
        return fields;
    };
    let given = |value: &Value| value.as_array().is_some_and(|list| !list.is_empty());
    fields
        .into_iter()
        .filter(|(_, value)| given(value))
        .collect()
}

fn text(text: &Text) -> Value {
    match text {
        Text::Exact(text) => json!({"Exact": text}),
        Text::Prefix(text) => json!({"Prefix": text}),
        Text::Suffix(text) => json!({"Suffix": text}),
        Text::Present => json!("Presence"),
    }
}
