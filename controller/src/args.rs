//! Flags and environment.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use clap::{Parser, ValueEnum};

use crate::desired::enrolment::Rules;
use crate::directory::Facts;
use crate::startup::Startup;

/// The controller of the Ambit service mesh.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub(crate) struct Args {
    /// Namespace that Ambit runs in
    #[arg(long, env = "POD_NAMESPACE", default_value = crds::SYSTEM_NAMESPACE)]
    pub(crate) namespace: String,
    /// Name of this pod: who holds the lease
    #[arg(long, env = "POD_NAME")]
    pub(crate) pod_name: String,
    /// Trust domain of the identities that are signed
    #[arg(long, env = "TRUST_DOMAIN", default_value = "cluster.local", value_parser = trust_domain)]
    pub(crate) trust_domain: String,
    /// Name of this cluster
    #[arg(long, env = "CLUSTER_ID", default_value = "Kubernetes")]
    pub(crate) cluster_id: String,
    /// Domain of the Services' DNS names
    #[arg(long, env = "CLUSTER_DOMAIN", default_value = "cluster.local")]
    pub(crate) cluster_domain: String,
    /// Where discovery and certificates are served: the first of these that can be listened on
    #[arg(
        long,
        env = "LISTEN",
        value_delimiter = ',',
        default_value = "[::]:15012,0.0.0.0:15012"
    )]
    pub(crate) listen: Vec<SocketAddr>,
    /// Where /healthz, /readyz and /metrics are served: the first of these that can be listened on
    #[arg(
        long,
        env = "HEALTH_LISTEN",
        value_delimiter = ',',
        default_value = "[::]:15014,0.0.0.0:15014"
    )]
    pub(crate) health_listen: Vec<SocketAddr>,
    /// How long a workload's certificate holds, such as 24h or 90m
    #[arg(long, env = "CERTIFICATE_TTL", default_value = "24h", value_parser = duration)]
    pub(crate) certificate_ttl: Duration,
    /// Secret of the certificate authority; made if there is none
    #[arg(long, env = "CA_SECRET", default_value = "ambit-ca")]
    pub(crate) ca_secret: String,
    /// ConfigMap that the authority's roots are published in
    #[arg(long, env = "ROOT_CONFIG_MAP", default_value = "ambit-ca-root")]
    pub(crate) root_config_map: String,
    /// Audience that proxies' tokens must have
    #[arg(long, env = "TOKEN_AUDIENCE", default_value = "istio-ca")]
    pub(crate) token_audience: String,
    /// Service account of the node proxies
    #[arg(long, env = "PROXY_SERVICE_ACCOUNT", default_value = "ambit-proxy")]
    pub(crate) proxy_service_account: String,
    /// Label of namespaces and pods that decides who is in the mesh
    #[arg(long, env = "ENROLMENT_LABEL", default_value = crds::DATAPLANE_MODE_LABEL)]
    pub(crate) enrolment_label: String,
    /// Value of that label that enrols
    #[arg(long, env = "ENROLMENT_VALUE", default_value = crds::DATAPLANE_MODE_AMBIENT)]
    pub(crate) enrolment_value: String,
    /// Value of that label that keeps a pod out
    #[arg(long, env = "OPT_OUT_VALUE", default_value = crds::DATAPLANE_MODE_NONE)]
    pub(crate) opt_out_value: String,
    /// Tunnel of AmbientNodes that are made; those that exist keep theirs
    #[arg(long, env = "TUNNEL_TYPE", default_value = "Geneve")]
    pub(crate) tunnel_type: TunnelType,
    /// Key of the taint that nodes have from their start until they are ready; empty for none
    #[arg(long, env = "STARTUP_TAINT", default_value = crds::STARTUP_TAINT, value_parser = taint)]
    pub(crate) startup_taint: Taint,
    /// Service account of the node agents
    #[arg(
        long,
        env = "AGENT_SERVICE_ACCOUNT",
        default_value = "ambit-node-agent"
    )]
    pub(crate) agent_service_account: String,
}

/// Key of a taint, or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Taint(Option<Arc<str>>);

/// See [`crds::TunnelType`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "PascalCase")]
pub(crate) enum TunnelType {
    Geneve,
    Veth,
}

impl Args {
    pub(crate) fn rules(&self) -> Rules {
        Rules {
            label: self.enrolment_label.clone(),
            enrol: self.enrolment_value.clone(),
            opt_out: self.opt_out_value.clone(),
            system_namespace: self.namespace.as_str().into(),
        }
    }

    pub(crate) fn facts(&self) -> Facts {
        Facts {
            trust_domain: self.trust_domain.clone(),
            cluster_id: self.cluster_id.clone(),
            cluster_domain: self.cluster_domain.clone(),
            rules: self.rules(),
        }
    }

    /// `None` if nodes are not to be held back.
    pub(crate) fn startup(&self) -> Option<Startup> {
        Some(Startup {
            taint: self.startup_taint.0.clone()?,
            system_namespace: self.namespace.as_str().into(),
            agent_account: self.agent_service_account.as_str().into(),
        })
    }

    /// DNS names that proxies may know the controller by.
    pub(crate) fn server_names(&self) -> Vec<String> {
        let service = format!("ambit-controller.{}", self.namespace);
        vec![
            format!("{service}.svc"),
            format!("{service}.svc.{}", self.cluster_domain),
            service,
        ]
    }
}

impl From<TunnelType> for crds::TunnelType {
    fn from(tunnel_type: TunnelType) -> Self {
        match tunnel_type {
            TunnelType::Geneve => Self::Geneve,
            TunnelType::Veth => Self::Veth,
        }
    }
}

fn trust_domain(text: &str) -> Result<String, String> {
    format!("spiffe://{text}/ns/a/sa/a")
        .parse::<crate::identity::SpiffeId>()
        .map_err(|_| "must be of lower-case letters, digits, '-', '.' and '_'".to_owned())?;
    Ok(text.to_owned())
}

/// As the API server checks it: a name, before it perhaps a domain.
fn taint(text: &str) -> Result<Taint, String> {
    if text.is_empty() {
        return Ok(Taint(None));
    }
    let (domain, name) = text.rsplit_once('/').unwrap_or(("x", text));
    let is_name = |text: &str| {
        let ends = [text.chars().next(), text.chars().next_back()];
        ends.into_iter()
            .all(|end| end.is_some_and(|end| end.is_ascii_alphanumeric()))
            && text
                .chars()
                .all(|one| one.is_ascii_alphanumeric() || "-_.".contains(one))
    };
    if name.len() > 63 || domain.len() > 253 || !is_name(name) || !is_name(domain) {
        return Err("must be the key of a taint, such as example.com/not-ready".to_owned());
    }
    Ok(Taint(Some(text.into())))
}

fn duration(text: &str) -> Result<Duration, String> {
    let span: jiff::SignedDuration = text
        .parse()
        .map_err(|error: jiff::Error| error.to_string())?;
    let duration = Duration::try_from(span).map_err(|error| error.to_string())?;
    if duration < Duration::from_secs(60) {
        return Err("must be at least one minute".to_owned());
    }
    Ok(duration)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Args, clap::Error> {
        Args::try_parse_from(["ambit-controller", "--pod-name", "me"].iter().chain(args))
    }

    #[test]
    fn durations_are_written_as_people_do() {
        let args = parse(&["--certificate-ttl", "90m"]).unwrap();
        assert_eq!(args.certificate_ttl, Duration::from_secs(5400));
        assert_eq!(
            parse(&[]).unwrap().certificate_ttl,
            Duration::from_secs(86400)
        );
        assert!(parse(&["--certificate-ttl", "5s"]).is_err());
        assert!(parse(&["--certificate-ttl", "soon"]).is_err());
    }

    #[test]
    fn both_families_are_served_where_there_are_both() {
        let args = parse(&[]).unwrap();
        let any = ["[::]:15012", "0.0.0.0:15012"].map(|any| any.parse().unwrap());
        assert_eq!(args.listen, any);
        let one = parse(&["--health-listen", "[fd00::1]:1"]).unwrap();
        assert_eq!(one.health_listen, ["[fd00::1]:1".parse().unwrap()]);
    }

    #[test]
    fn tunnel_types_are_written_as_in_the_object() {
        assert_eq!(
            parse(&["--tunnel-type", "Veth"]).unwrap().tunnel_type,
            TunnelType::Veth
        );
        assert!(parse(&["--tunnel-type", "Gre"]).is_err());
    }

    #[test]
    fn nodes_are_held_back_by_a_taint_that_can_be_named_or_left_out() {
        let taint = |args: &[&str]| parse(args).unwrap().startup().map(|startup| startup.taint);
        assert_eq!(taint(&[]).as_deref(), Some("ambit.mesh/not-ready"));
        assert_eq!(
            taint(&["--startup-taint", "a.b/c"]).as_deref(),
            Some("a.b/c")
        );
        assert_eq!(taint(&["--startup-taint", ""]), None);
        for wrong in ["a/b/c", "a b", "/x", "x/", "x="] {
            assert!(parse(&["--startup-taint", wrong]).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_trust_domain_that_no_identity_can_have_is_refused() {
        assert!(parse(&["--trust-domain", "Cluster/Local"]).is_err());
    }
}
