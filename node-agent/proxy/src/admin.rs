//! What people look at: `/config_dump`, in the field's form, so that its tools can read it.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};
use base64::Engine;
use base64::prelude::BASE64_STANDARD as BASE64;
use hbone::Shared;
use hbone::certificates::Described;
use hbone::directory::{Directory, Service, Workload};
use jiff::Timestamp;
use serde_json::{Value, json};

/// The pages.
pub(crate) fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/config_dump", get(config_dump))
        .with_state(shared)
}

async fn config_dump(State(shared): State<Arc<Shared>>) -> Json<Value> {
    let directory = shared.directory.load_full();
    let local = shared.local.load_full();
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "config": {
            "trustDomain": shared.settings.trust_domain.as_str(),
            "clusterId": shared.settings.cluster,
        },
        "workloads": directory.workloads().map(|found| workload(found)).collect::<Vec<_>>(),
        "services": directory.services().map(|found| service(&directory, found)).collect::<Vec<_>>(),
        "policies": directory.policies().map(|(name, policy)| json!({
            "name": &**name,
            "namespace": &*policy.namespace,
            "scope": format!("{:?}", policy.scope),
            "action": format!("{:?}", policy.action),
            "dryRun": policy.dry_run,
            "rules": policy.rules.len(),
        })).collect::<Vec<_>>(),
        "certificates": certificates(&shared),
        "workloadState": local.iter().map(|workload| json!({
            "uid": &*workload.uid,
            "namespace": &*workload.namespace,
            "name": &*workload.name,
            "identity": workload.identity.to_string(),
            "workloadIps": workload.addresses,
        })).collect::<Vec<_>>(),
        "tunnels": shared.tunnels(),
    }))
}

fn workload(found: &Workload) -> Value {
    json!({
        "uid": &*found.uid,
        "name": &*found.name,
        "namespace": &*found.namespace,
        "workloadIps": found.addresses,
        "protocol": if found.hbone.is_some() { "HBONE" } else { "TCP" },
        "trustDomain": found.hbone.as_ref().map_or("", |id| id.trust_domain().as_str()),
        "serviceAccount": found.service_account,
        "node": found.node,
        "network": found.network,
        "status": if found.healthy { "Healthy" } else { "Unhealthy" },
        "workloadName": &*found.workload_name,
        "workloadType": found.workload_type,
        "canonicalName": &*found.canonical_name,
        "canonicalRevision": found.canonical_revision,
        "clusterId": found.cluster,
        "locality": {
            "region": found.locality.region,
            "zone": found.locality.zone,
            "subzone": found.locality.subzone,
        },
        "services": found.services.keys().map(|key| &**key).collect::<Vec<_>>(),
        "authorizationPolicies": found.policies.iter().map(|name| &**name).collect::<Vec<_>>(),
    })
}

fn service(directory: &Directory, found: &Service) -> Value {
    let vips: Vec<String> = found.addresses.iter().map(IpAddr::to_string).collect();
    let endpoints = directory.endpoints(&found.key).map(|endpoint| {
        let ports = endpoint.services.get(&found.key);
        json!({"workloadUid": &*endpoint.uid, "port": ports})
    });
    json!({
        "name": &*found.name,
        "namespace": &*found.namespace,
        "hostname": &*found.hostname,
        "vips": vips,
        "ports": found.ports,
        "endpoints": endpoints.collect::<Vec<_>>(),
    })
}

fn certificates(shared: &Shared) -> Vec<Value> {
    let now = SystemTime::now();
    let states = shared.certificates.states();
    let rows = states.iter().map(|(identity, state)| {
        let word = match (state.valid(now), &state.error) {
            (Some(_), _) => "Available".to_owned(),
            (None, Some(error)) => format!("Unavailable: {error}"),
            (None, None) => "Initializing".to_owned(),
        };
        let certificate = state.certificate.as_ref();
        json!({
            "identity": identity.to_string(),
            "state": word,
            "certChain": certificate.map_or_else(Vec::new, |found| described(&found.chain_described)),
            "rootCerts": certificate.map_or_else(Vec::new, |found| described(&found.roots_described)),
        })
    });
    rows.collect()
}

fn described(certificates: &[Described]) -> Vec<Value> {
    let rows = certificates.iter().map(|certificate| {
        json!({
            // The field's tools expect the PEM text in base64 once more.
            "pem": BASE64.encode(pem(&certificate.der)),
            "serialNumber": certificate.serial,
            "validFrom": rfc3339(certificate.not_before),
            "expirationTime": rfc3339(certificate.not_after),
        })
    });
    rows.collect()
}

/// RFC 7468.
fn pem(der: &[u8]) -> String {
    let text = BASE64.encode(der);
    let mut lines = "-----BEGIN CERTIFICATE-----\n".to_owned();
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(rest.len().min(64));
        lines += &format!("{line}\n");
        rest = after;
    }
    lines + "-----END CERTIFICATE-----\n"
}

fn rfc3339(time: SystemTime) -> String {
    Timestamp::try_from(time).map_or_else(|error| error.to_string(), |time| time.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_printed_in_lines_of_64() {
        let text = pem(&[0; 100]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 5);
        assert_eq!(lines[1].len(), 64);
        assert_eq!(BASE64.decode(lines[1..4].concat()).unwrap(), [0; 100]);
    }
}
