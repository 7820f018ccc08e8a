//! The stage as a scenario sees it in one combination: who plays which part, and where.
//!
//! ```text
//!            home                              away
//!  in mesh   client  near ◀──── Services ────▶ far
//!  outside   stranger host (a node's own network) remote, away_host
//! ```

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use serde_json::Value;

use crate::manifest;
use crate::matrix::{Case, cases, under_every_filter};
use crate::podtool::Place;
use crate::stage::{HOST_TCP, MESH, NODE_1, PLAIN, STAGE, Stage};
use crate::traffic::Proxies;

/// A pod in a part; prints as its namespace and name.
#[derive(Clone, Debug)]
pub struct Actor {
    /// Its namespace.
    pub namespace: &'static str,
    /// Its name, and that of its Service.
    pub name: &'static str,
    /// Its address in the family that is spoken.
    pub ip: IpAddr,
    place: Place,
}

/// What a scenario works with.
#[derive(Debug)]
pub struct Scene {
    /// The stage.
    pub stage: &'static Stage,
    /// The combination.
    pub case: Case,
    /// Whether it is the first of its family: what is slow and does not depend on the rest is done once.
    pub first_of_family: bool,
    /// The node that most connections start from.
    pub home: &'static str,
    /// The other node.
    pub away: &'static str,
    /// Mesh pod at home.
    pub client: Actor,
    /// Another one.
    pub near: Actor,
    /// Mesh pod of the other node.
    pub far: Actor,
    /// Pod outside the mesh at home.
    pub stranger: Actor,
    /// Pod outside the mesh of the other node.
    pub remote: Actor,
    /// Pod on the network of the node at home.
    pub host: Actor,
    /// Pod on the network of the other node.
    pub away_host: Actor,
    proxies: Proxies,
}

/// Plays a scenario in every combination.
///
/// # Errors
/// Names each combination that it failed in, and why.
pub fn in_every_case(scenario: impl Fn(&Scene) -> Result<()>) -> Result<()> {
    play(Stage::set()?, &cases()?, scenario)
}

/// Plays a scenario in these combinations.
///
/// # Errors
/// Names each combination that it failed in, and why.
pub fn play(
    stage: &'static Stage,
    all: &[Case],
    scenario: impl Fn(&Scene) -> Result<()>,
) -> Result<()> {
    let proxies = Proxies::find(&stage.cluster)?;
    let mut failures = Vec::new();
    under_every_filter(&stage.cluster, |filter| {
        for case in all.iter().filter(|case| case.rp_filter == filter) {
            let first = all.iter().find(|other| other.family == case.family) == Some(case);
            let scene = Scene::new(stage, *case, first, proxies.clone())?;
            if let Err(error) = scenario(&scene) {
                let backend = stage.cluster.iptables(case.home)?;
                failures.push(format!("{case}, whose rules are in {backend}: {error:#}"));
            }
        }
        Ok(())
    })?;
    let count = failures.len();
    ensure!(
        failures.is_empty(),
        "{count} of {} combinations failed:\n{}",
        all.len(),
        failures.join("\n")
    );
    Ok(())
}

/// That something is as it should be.
///
/// # Errors
/// If not; names both.
pub fn same<A: PartialEq<B> + fmt::Debug, B: fmt::Debug>(found: A, wanted: B) -> Result<()> {
    ensure!(found == wanted, "found {found:?}, wanted {wanted:?}");
    Ok(())
}

impl Scene {
    fn new(
        stage: &'static Stage,
        case: Case,
        first_of_family: bool,
        proxies: Proxies,
    ) -> Result<Self> {
        let pod = |namespace, names: [&'static str; 2]| {
            let name = names[usize::from(case.home != NODE_1)];
            Ok::<_, anyhow::Error>(Actor {
                namespace,
                name,
                ip: stage.pod_ip(namespace, name, case.family)?,
                place: Place::pod(&stage.cluster, namespace, name),
            })
        };
        Ok(Self {
            stage,
            case,
            first_of_family,
            home: case.home,
            away: case.away(),
            client: pod(MESH, ["client", "client-2"])?,
            near: pod(MESH, ["near", "far"])?,
            far: pod(MESH, ["far", "near"])?,
            stranger: pod(PLAIN, ["stranger", "remote"])?,
            remote: pod(PLAIN, ["remote", "stranger"])?,
            host: pod(PLAIN, ["host", "host-2"])?,
            away_host: pod(PLAIN, ["host-2", "host"])?,
            proxies,
        })
    }

    /// Does something, and tells which ways the stage's connections took meanwhile.
    ///
    /// # Errors
    /// If it fails.
    pub fn ways<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<(T, Vec<String>)> {
        self.proxies.ways_of(STAGE, work)
    }

    /// The ClusterIP of an actor's Service, with the port of its TCP server.
    ///
    /// # Errors
    /// If it has none.
    pub fn service(&self, of: &Actor) -> Result<String> {
        self.cluster_ip(of.namespace, of.name)
            .map(|ip| with_port(ip, of.tcp_port()))
    }

    /// The ClusterIP of a Service in the family that is spoken.
    ///
    /// # Errors
    /// If it has none.
    pub fn cluster_ip(&self, namespace: &str, service: &str) -> Result<IpAddr> {
        self.stage.cluster_ip(namespace, service, self.case.family)
    }
}

impl Actor {
    /// Its address, with this port.
    #[must_use]
    pub fn port(&self, port: u16) -> String {
        with_port(self.ip, port)
    }

    /// Its address, with the port of its TCP server.
    #[must_use]
    pub fn tcp(&self) -> String {
        self.port(self.tcp_port())
    }

    /// The port of its TCP server.
    #[must_use]
    pub fn tcp_port(&self) -> u16 {
        let on_host = self.name.starts_with("host");
        if on_host { HOST_TCP } else { manifest::TCP }
    }

    /// See [`Place::send`]; the address is parsed.
    ///
    /// # Errors
    /// If the line does not come back.
    pub fn send(&self, to: &str) -> Result<IpAddr> {
        Ok(self.place.send(to)?.parse()?)
    }

    /// See [`Place::run`].
    ///
    /// # Errors
    /// If the client fails.
    pub fn run(&self, arguments: &[&str]) -> Result<Value> {
        self.place.run(arguments)
    }

    /// See [`Place::attempt`].
    ///
    /// # Errors
    /// If there is no answer at all.
    pub fn attempt(&self, arguments: &[&str]) -> Result<Value> {
        self.place.attempt(arguments, "")
    }
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// An address and a port as one writes them.
#[must_use]
pub fn with_port(ip: IpAddr, port: u16) -> String {
    SocketAddr::new(ip, port).to_string()
}
