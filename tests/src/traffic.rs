//! The way that connections took, as the proxies count them.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::cluster::{Cluster, SYSTEM, items};
use crate::command;

/// Port of a proxy's metrics.
const METRICS: u16 = 15020;

/// The nodes and the addresses of their proxies. This machine has a way to them, as to all pods.
#[derive(Clone, Debug)]
pub struct Proxies(Vec<(String, IpAddr)>);

impl Proxies {
    /// Those that run now.
    ///
    /// # Errors
    /// If a node has none.
    pub fn find(cluster: &Cluster) -> Result<Self> {
        let label = "app.kubernetes.io/name=ambit-proxy";
        let pods = cluster.get(&["-n", SYSTEM, "pods", "-l", label])?;
        let mut all = Vec::new();
        for pod in items(&pods).filter(|pod| pod["metadata"]["deletionTimestamp"].is_null()) {
            let field = |value: &Value| {
                value
                    .as_str()
                    .map(str::to_owned)
                    .context("a proxy without node or address")
            };
            all.push((
                field(&pod["spec"]["nodeName"])?,
                field(&pod["status"]["podIP"])?.parse()?,
            ));
        }
        Ok(Self(all))
    }

    /// What they have counted up to now.
    ///
    /// # Errors
    /// If one does not answer.
    pub fn count(&self) -> Result<Counted> {
        let mut all = BTreeMap::new();
        for (node, ip) in &self.0 {
            let page = format!("http://{}/metrics", SocketAddr::new(*ip, METRICS));
            let text = command::output("curl", &["-sSf", "--max-time", "5", &page])?;
            all.extend(text.lines().filter_map(|line| connections(node, line)));
        }
        Ok(Counted(all))
    }

    /// Does something, and tells which ways connections of these namespaces took meanwhile.
    ///
    /// # Errors
    /// If it fails, or a proxy does not answer.
    pub fn ways_of<T>(
        &self,
        namespaces: &str,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<(T, Vec<String>)> {
        let before = self.count()?;
        let done = work()?;
        Ok((done, self.count()?.since(&before, namespaces)))
    }
}

/// What all proxies have counted up to some time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counted(BTreeMap<String, u64>);

impl Counted {
    /// The ways that were taken since `before` from or to a namespace whose name starts so: a line each,
    /// for example `node-1 out shop/client -> shop/server mtls` (`via` a Service, `failed` with a flag).
    #[must_use]
    pub fn since(&self, before: &Self, namespaces: &str) -> Vec<String> {
        let all = self.0.iter();
        all.filter(|(way, count)| before.0.get(*way) != Some(count))
            .filter(|(way, _)| way.split(' ').any(|word| word.starts_with(namespaces)))
            .map(|(way, _)| way.clone())
            .collect()
    }
}

/// Does something, and tells which ways connections of these namespaces took meanwhile.
///
/// # Errors
/// If it fails, or a proxy does not answer.
pub fn ways_of<T>(
    cluster: &Cluster,
    namespaces: &str,
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, Vec<String>)> {
    Proxies::find(cluster)?.ways_of(namespaces, work)
}

/// A line of a proxy's metrics, if it counts connections that were opened or failed.
fn connections(node: &str, line: &str) -> Option<(String, u64)> {
    let (kind, rest) = line
        .strip_prefix("istio_tcp_connections_")?
        .split_once('{')?;
    let (labels, count) = rest.rsplit_once("} ")?;
    let labels: BTreeMap<&str, &str> = labels
        .split(',')
        .filter_map(|pair| pair.split_once('='))
        .map(|(name, value)| (name, value.trim_matches('"')))
        .collect();
    let label = |name: &str| labels.get(name).copied().unwrap_or("unknown");
    let end = |side: &str| {
        let namespace = label(&format!("{side}_workload_namespace"));
        format!("{namespace}/{}", label(&format!("{side}_workload")))
    };
    let direction = if label("reporter") == "source" {
        "out"
    } else {
        "in"
    };
    let security = match label("connection_security_policy") {
        "mutual_tls" => "mtls",
        _ => "plain",
    };
    let mut way = format!(
        "{node} {direction} {} -> {}",
        end("source"),
        end("destination")
    );
    if label("destination_service") != "unknown" {
        way += &format!(" via {}", label("destination_service"));
    }
    match kind {
        "opened_total" => way += &format!(" {security}"),
        "failed_total" => way += &format!(" failed {}", label("response_flags")),
        _ => return None,
    }
    Some((way, count.trim().parse().ok()?))
}

/// This moment as proxies' logs print it, in UTC (RFC 3339).
///
/// # Errors
/// If there is no `date`.
pub fn now() -> Result<String> {
    let now = command::output("date", &["-u", "+%Y-%m-%dT%H:%M:%S.%6NZ"])?;
    Ok(now.trim().to_owned())
}

/// The lines that a proxy's access log has about a destination since `since` (RFC 3339).
///
/// # Errors
/// If there is no proxy.
pub fn log_of(cluster: &Cluster, node: &str, since: &str, about: &str) -> Result<Vec<String>> {
    let pod = cluster.system_pod("ambit-proxy", node)?;
    let since = format!("--since-time={since}");
    let log = cluster
        .kubectl(&["-n", SYSTEM, "logs", &pod, &since])
        .context("the proxy's log")?;
    Ok(log
        .lines()
        .filter(|line| line.contains(about))
        .map(str::to_owned)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = r#"istio_tcp_connections_opened_total{reporter="source",source_workload="client",source_workload_namespace="shop",destination_workload="server",destination_workload_namespace="shop",destination_service="server.shop.svc.cluster.local",connection_security_policy="mutual_tls",response_flags="-"} 3"#;

    #[test]
    fn a_line_of_metrics_becomes_a_way() {
        let way = "node-1 out shop/client -> shop/server via server.shop.svc.cluster.local mtls";
        assert_eq!(connections("node-1", LINE), Some((way.to_owned(), 3)));
        assert_eq!(
            connections("node-1", "# HELP istio_tcp_connections_opened Connections"),
            None
        );
        assert_eq!(
            connections("node-1", "istio_tcp_sent_bytes_total{a=\"b\"} 3"),
            None
        );
    }

    #[test]
    fn only_ways_whose_count_has_changed_are_new() {
        let counted = |count| {
            Counted(
                connections("node-1", &LINE.replace(" 3", count))
                    .into_iter()
                    .collect(),
            )
        };
        assert!(counted(" 3").since(&counted(" 3"), "shop").is_empty());
        assert_eq!(counted(" 4").since(&counted(" 3"), "shop").len(), 1);
        assert!(counted(" 4").since(&counted(" 3"), "other").is_empty());
    }
}
