//! Traffic of many new connections between pods of both nodes, while a test does something.
//!
//! ```text
//!       node-1                          node-2
//!   client-1 ──▶ server-1, server-2 ◀── client-2      a client to both servers, by their addresses of
//!        └────▶ Service web ◀──────────────┘          both families and by the Service over them
//! ```
//!
//! A client is podtool in its pod's namespaces, started on the node: it needs neither API server nor kubelet, and ends
//! when its standard input does.

pub mod report;

use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::cluster::{Cluster, node_words};
use crate::guard::Namespace;
use crate::manifest::{self, Pod, TCP};
use crate::podtool::Place;
use crate::process;
use crate::scene::with_port;
use crate::stage::{NODE_1, NODE_2};
use crate::traffic::ways_of;
use crate::wait::{SERVED, eventually};

pub use report::Report;

/// New connections a second that a load must have made at least, all clients together.
pub const LEAST_RATE: f64 = 200.0;

/// What each of the two clients asks for; a little more than [`LEAST_RATE`] needs.
const RATE_OF_CLIENT: &str = "125";

/// So many failures and cuts are told in words.
const TOLD: usize = 5;

/// Path of podtool in its image.
const PODTOOL: &str = "/usr/local/bin/podtool";

const CLIENTS: [(&str, &str); 2] = [("client-1", NODE_1), ("client-2", NODE_2)];
const SERVERS: [(&str, &str); 2] = [("server-1", NODE_1), ("server-2", NODE_2)];

/// A namespace with a client and a server on each node, and a Service over the servers.
#[derive(Debug)]
pub struct Party {
    cluster: Cluster,
    /// The namespace.
    pub namespace: Namespace,
    targets: Vec<String>,
}

impl Party {
    /// Makes it, in the mesh or not, and waits until its pods are ready and all nodes know that.
    ///
    /// # Errors
    /// If they do not get ready.
    pub fn gather(cluster: &Cluster, topic: &str, mode: Option<&str>) -> Result<Self> {
        let namespace = Namespace::create(cluster, topic, mode)?;
        let name = namespace.name.as_str();
        let mut all = manifest::service(name, "web", "server", false);
        for (pod, node) in CLIENTS {
            all += &Pod::new(name, pod, node).manifests();
        }
        for (pod, node) in SERVERS {
            let pod = Pod {
                app: Some("server"),
                ..Pod::new(name, pod, node)
            };
            all += &pod.manifests();
        }
        cluster.apply(&all)?;
        cluster.wait_ready(name)?;
        let targets = targets(cluster, name)?;
        let party = Self {
            cluster: cluster.clone(),
            namespace,
            targets,
        };
        // Kube-proxy refuses for a Service until it has heard that its pods are ready.
        eventually(SERVED, "every node knows the Service", || party.try_all())?;
        Ok(party)
    }

    /// The addresses of all its pods.
    ///
    /// # Errors
    /// If one has none.
    pub fn ips(&self) -> Result<Vec<IpAddr>> {
        let mut all = Vec::new();
        for (pod, _) in CLIENTS.iter().chain(&SERVERS) {
            all.extend(self.cluster.pod_ips(&self.namespace.name, pod)?);
        }
        Ok(all)
    }

    /// Waits until its pods are in the mesh, and the proxies of both nodes know that: one may have its knowledge from a
    /// controller that has not heard of them yet.
    ///
    /// # Errors
    /// If that is not so within `limit`.
    pub fn wait_in_mesh(&self, limit: Duration) -> Result<()> {
        let name = self.namespace.name.as_str();
        self.cluster.wait_in_mesh(name, limit)?;
        eventually(limit, "known to the proxies of both nodes", || {
            let ((), ways) = ways_of(&self.cluster, name, || self.try_all())?;
            for between in [("client-1", "server-2"), ("client-2", "server-1")] {
                let mut taken = ways
                    .iter()
                    .filter(|way| way.contains(between.0) && way.contains(between.1))
                    .peekable();
                ensure!(taken.peek().is_some(), "{between:?}: {ways:?}");
                ensure!(taken.all(|way| way.ends_with(" mtls")), "{ways:?}");
            }
            Ok(())
        })
        .map(drop)
    }

    /// One connection from each client to each of the addresses.
    fn try_all(&self) -> Result<()> {
        for (client, _) in CLIENTS {
            let place = Place::pod(&self.cluster, &self.namespace.name, client);
            for target in &self.targets {
                let (_, address) = target.split_once('=').context("no address")?;
                place.send(address)?;
            }
        }
        Ok(())
    }

    /// Starts traffic with this text on every connection.
    ///
    /// # Errors
    /// If a client does not start.
    pub fn start(&self, text: &str) -> Result<Load> {
        let mut clients = Vec::new();
        for (pod, node) in CLIENTS {
            let process = process::in_pod(&self.cluster, &self.namespace.name, "podtool", pod)?;
            let mut words = node_words(node)?;
            let pid = process.pid.to_string();
            let enter = ["nsenter", "--target", &pid, "--net", "--mount", PODTOOL];
            words.extend(enter.map(str::to_owned));
            words.extend(["traffic", "--rate", RATE_OF_CLIENT, "--text", text].map(str::to_owned));
            for target in &self.targets {
                words.extend(["--to".to_owned(), target.clone()]);
            }
            clients.push(Client::start(pod, &words)?);
        }
        Ok(Load {
            clients,
            started: Instant::now(),
        })
    }

    /// Does something under load; what came of both. The load begins before the work and outlasts it.
    ///
    /// # Errors
    /// If the work fails, or the load was not as much as it should be.
    pub fn under_load<T>(
        &self,
        text: &str,
        work: impl FnOnce(&mut Load) -> Result<T>,
    ) -> Result<(T, Report)> {
        let mut load = self.start(text)?;
        load.wait_flowing()?;
        let done = work(&mut load);
        let report = load.end();
        match (done, report) {
            (Ok(done), Ok(report)) => Ok((done, report)),
            (Err(error), Ok(report)) => Err(error.context(format!("meanwhile: {}", tell(&report)))),
            (Err(error), Err(_)) | (Ok(_), Err(error)) => Err(error),
        }
    }
}

/// Traffic that flows until this ends.
#[derive(Debug)]
pub struct Load {
    clients: Vec<Client>,
    started: Instant,
}

impl Load {
    /// What came of it up to now.
    ///
    /// # Errors
    /// If a client does not say.
    pub fn report(&mut self) -> Result<Report> {
        let mut sum = Report::default();
        for client in &mut self.clients {
            sum.add(client.report()?);
        }
        Ok(sum)
    }

    /// Waits until every kind of connection has been made.
    fn wait_flowing(&mut self) -> Result<()> {
        eventually(Duration::from_secs(20), "traffic flows", || {
            let report = self.report()?;
            let all = report.answers.len() == SERVERS.len();
            ensure!(all && report.attempts >= 100, "{}", tell(&report));
            Ok(())
        })
        .map(drop)
    }

    /// Ends it; what came of it.
    ///
    /// # Errors
    /// If a client does not say, or there was less traffic than there should have been.
    pub fn end(self) -> Result<Report> {
        let took = self.started.elapsed();
        let mut sum = Report::default();
        for client in self.clients {
            sum.add(client.end()?);
        }
        let rate = sum.attempts as f64 / took.as_secs_f64();
        println!(
            "load: {rate:.0} connections/s for {took:.0?}: {}",
            tell(&sum)
        );
        ensure!(
            rate >= LEAST_RATE,
            "{rate:.0} connections a second are too few"
        );
        Ok(sum)
    }
}

/// A report in words, with the first failures and cuts.
#[must_use]
pub fn tell(report: &Report) -> String {
    let cuts: Vec<_> = report.cuts().collect();
    let mut words = format!(
        "{} connections, {} failed, longest {} ms; {} kept, {} cut; answers {:?}",
        report.attempts,
        report.failed,
        report.longest_ms,
        report.held.len(),
        cuts.len(),
        report.answers,
    );
    for failure in report.failures.iter().take(TOLD) {
        words += &format!("\n  failed: {failure:?}");
    }
    for held in cuts.into_iter().take(TOLD) {
        words += &format!("\n  cut: {held:?}");
    }
    words
}

/// Fails unless every connection of the load came to a good end.
///
/// # Errors
/// If one failed or was cut.
pub fn ensure_none_failed(report: &Report) -> Result<()> {
    ensure!(
        report.failed == 0 && report.cuts().next().is_none(),
        "{}",
        tell(report)
    );
    Ok(())
}

/// What clients connect to.
fn targets(cluster: &Cluster, namespace: &str) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for (pod, _) in SERVERS {
        for ip in cluster.pod_ips(namespace, pod)? {
            all.push(format!("{pod}={}", with_port(ip, TCP)));
        }
    }
    let service = cluster.get(&["-n", namespace, "service", "web"])?;
    let ips = service["spec"]["clusterIPs"].as_array();
    for ip in ips.context("a Service without addresses")? {
        let ip: IpAddr = ip.as_str().context("no address")?.parse()?;
        let servers = SERVERS.map(|(pod, _)| pod).join("|");
        all.push(format!("{servers}={}", with_port(ip, TCP)));
    }
    Ok(all)
}

/// Podtool in the namespaces of a pod.
#[derive(Debug)]
struct Client {
    pod: &'static str,
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Client {
    fn start(pod: &'static str, words: &[String]) -> Result<Self> {
        let mut child = Command::new(&words[0])
            .args(&words[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {}", words.join(" ")))?;
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().context("no standard output")?);
        Ok(Self {
            pod,
            child,
            input,
            output,
        })
    }

    fn report(&mut self) -> Result<Report> {
        let input = self.input.as_mut().context("ended already")?;
        writeln!(input, "report").with_context(|| format!("{} has ended", self.pod))?;
        self.line()
    }

    fn end(mut self) -> Result<Report> {
        drop(self.input.take());
        self.line()
    }

    fn line(&mut self) -> Result<Report> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("{} printed {line:?}", self.pod))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // It ends by itself once its input has; what has ended already cannot be ended.
        drop(self.input.take());
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
