//! Pods go, and the next ones that get their addresses are of other identities.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::cluster::Cluster;
use mesh_tests::guard::Namespace;
use mesh_tests::manifest::{Pod, TCP, service};
use mesh_tests::podtool::Place;
use mesh_tests::scene::with_port;
use mesh_tests::soak::{count, recorded};
use mesh_tests::stage::{NODE_1, NODE_2};
use mesh_tests::traffic::{log_of, now};
use mesh_tests::wait::eventually;
use serde::Serialize;
use serde_json::Value;

/// The houses of a street. Two tenants live in each in turn, each with an identity and a Service of its name.
const HOUSES: usize = 4;

/// Pods that keep their addresses, with their nodes: they talk to the houses all the time, and tenants to them.
const NEIGHBOURS: [(&str, &str); 2] = [("near", NODE_2), ("far", NODE_1)];

/// So often a new tenant talks to each address of each neighbour.
const GREETINGS: usize = 5;

/// Until somebody who was refused asks again.
const PAUSE: Duration = Duration::from_millis(50);

/// Where the plugin that gives addresses keeps which one it gave last: without it, it gives the lowest that is free.
const FORGET_LAST: &str = "rm -f /var/lib/cni/networks/ambit/last_reserved_ip.*";

#[derive(Debug, Default, Serialize)]
struct Numbers {
    /// Pods that got addresses that pods of other identities had just before.
    reused: usize,
    connections: usize,
    /// Those that were refused or cut: nobody has the address for a moment.
    failed: usize,
}

/// A pod that has an address for some time.
struct Tenant {
    name: String,
    ips: Vec<IpAddr>,
}

/// A connection that worked.
struct Made {
    /// The client's own address, and the one that it dialled.
    ends: [SocketAddr; 2],
    from: String,
    to: String,
}

/// What a neighbour asks for: an address, or a Service, which only its own pods may answer for.
enum Target {
    Address(IpAddr),
    Service(String),
}

/// What somebody got who asked again and again.
#[derive(Default)]
struct Asked {
    made: Vec<Made>,
    failed: usize,
}

struct Street {
    cluster: Cluster,
    namespace: Namespace,
}

fn tenant(house: usize, turn: usize) -> String {
    format!("{}-{house}", ["even", "odd"][turn % 2])
}

impl Street {
    fn new() -> Result<Self> {
        let cluster = Cluster::current()?;
        cluster.wait_recovered()?;
        let namespace = Namespace::create(&cluster, "reuse", Some("ambient"))?;
        let name = namespace.name.as_str();
        let pods = NEIGHBOURS.map(|(pod, node)| Pod::new(name, pod, node).manifests());
        let mut manifests = pods.concat();
        for house in 0..HOUSES {
            for turn in 0..2 {
                let tenant = tenant(house, turn);
                manifests += &service(name, &tenant, &tenant, false);
            }
        }
        cluster.apply(&manifests)?;
        cluster.wait_ready(name)?;
        cluster.wait_in_mesh(name, Duration::from_secs(20))?;
        Ok(Self { cluster, namespace })
    }

    fn pod(&self, name: &str) -> Place {
        Place::pod(&self.cluster, &self.namespace.name, name)
    }

    fn move_in(&self, tenant: String) -> Result<Tenant> {
        let name = self.namespace.name.as_str();
        self.cluster.on_node(NODE_2, &["sh", "-c", FORGET_LAST])?;
        self.cluster
            .apply(&Pod::new(name, &tenant, NODE_2).manifests())?;
        let wait = ["-n", name, "wait", "--for=condition=Ready", "--timeout=60s"];
        let pod = format!("pod/{tenant}");
        self.cluster.kubectl(&[&wait[..], &[&pod]].concat())?;
        let ips = self.cluster.pod_ips(name, &tenant)?;
        Ok(Tenant { name: tenant, ips })
    }

    /// The tenant's addresses are free once this is done, which is not so where it has no time to end.
    fn move_out(&self, tenant: &Tenant) -> Result<()> {
        let name = self.namespace.name.as_str();
        let delete = [
            "-n",
            name,
            "delete",
            "pod",
            &tenant.name,
            "--grace-period=1",
        ];
        self.cluster.kubectl(&delete).map(drop)
    }

    /// A neighbour asks for these in turn until told to stop.
    fn keep_asking(&self, from: &str, targets: &[Target], stop: &AtomicBool) -> Result<Asked> {
        let (place, mut asked) = (self.pod(from), Asked::default());
        for target in targets.iter().cycle() {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let to = match target {
                Target::Address(ip) => with_port(*ip, TCP),
                Target::Service(name) => format!("{name}.{}:{TCP}", self.namespace.name),
            };
            let seen = place.attempt(&["send", "--to", &to], "")?;
            if !seen["error"].is_null() {
                asked.failed += 1;
                thread::sleep(PAUSE);
                continue;
            }
            let made = Made::read(from, &seen)?;
            if let Target::Service(name) = target {
                ensure!(*name == made.to, "{} answers for {name}", made.to);
            }
            asked.made.push(made);
        }
        Ok(asked)
    }

    /// A new tenant talks to its neighbours.
    fn greet(&self, tenant: &Tenant) -> Result<Vec<Made>> {
        let place = self.pod(&tenant.name);
        let mut made = Vec::new();
        for (neighbour, _) in NEIGHBOURS {
            for ip in self.cluster.pod_ips(&self.namespace.name, neighbour)? {
                for _ in 0..GREETINGS {
                    let seen = place.run(&["send", "--to", &with_port(ip, TCP)])?;
                    made.push(Made::read(&tenant.name, &seen)?);
                }
            }
        }
        Ok(made)
    }

    /// All tenants go and the next ones come, while the neighbours keep asking.
    fn change(&self, old: &[Tenant], turn: usize) -> Result<(Vec<Tenant>, Asked)> {
        let stop = &AtomicBool::new(false);
        thread::scope(|scope| {
            let mut asking = Vec::new();
            for (from, _) in NEIGHBOURS {
                for (house, tenant) in old.iter().enumerate() {
                    let addresses = tenant.ips.iter().copied().map(Target::Address).collect();
                    let services = [0, 1].map(|turn| Target::Service(self::tenant(house, turn)));
                    for targets in [addresses, Vec::from(services)] {
                        asking.push(scope.spawn(move || self.keep_asking(from, &targets, stop)));
                    }
                }
            }
            let moves = old.iter().enumerate().map(|(house, old)| {
                scope.spawn(move || {
                    self.move_out(old)?;
                    let next = self.move_in(tenant(house, turn))?;
                    let made = self.greet(&next)?;
                    anyhow::Ok((next, made))
                })
            });
            let moved: Vec<_> = moves.collect::<Vec<_>>().into_iter().map(joined).collect();
            stop.store(true, Ordering::Relaxed);
            let asked: Vec<_> = asking.into_iter().map(joined).collect();
            let (mut next, mut all) = (Vec::new(), Asked::default());
            for one in moved {
                let (tenant, made) = one?;
                next.push(tenant);
                all.made.extend(made);
            }
            for one in asked {
                let Asked { made, failed } = one?;
                all.made.extend(made);
                all.failed += failed;
            }
            Ok((next, all))
        })
    }

    /// What the proxies say of who was at either end of each connection is true.
    fn ensure_known(&self, made: &[Made], tenants: &[Tenant], since: &str) -> Result<()> {
        eventually(Duration::from_secs(10), "all is logged", || {
            let mut lines = Vec::new();
            for (_, node) in NEIGHBOURS {
                let all = log_of(&self.cluster, node, since, " connection complete ")?;
                lines.extend(all.into_iter().filter(|line| line.as_str() >= since));
            }
            let by_ends: HashMap<[SocketAddr; 2], &String> = lines
                .iter()
                .filter_map(|line| Some((ends(line)?, line)))
                .collect();
            for one in made {
                let line = by_ends.get(&one.ends);
                let line = line.with_context(|| format!("nothing is logged of {:?}", one.ends))?;
                self.ensure_end(line, "src", &one.from)?;
                self.ensure_end(line, "dst", &one.to)?;
            }
            tenants
                .iter()
                .try_for_each(|tenant| self.ensure_heard_of(tenant, &lines))
        })
        .map(drop)
    }

    /// The proxy of the far neighbour was shown the new tenant's certificate by all that came from its addresses.
    fn ensure_heard_of(&self, tenant: &Tenant, lines: &[String]) -> Result<()> {
        let is_from =
            |line: &str, ip: IpAddr| ends(line).is_some_and(|[source, _]| source.ip() == ip);
        let inbound = |line: &&String| line.contains(r#" direction="inbound" mtls=true "#);
        for ip in &tenant.ips {
            let heard: Vec<&String> = lines
                .iter()
                .filter(inbound)
                .filter(|line| is_from(line, *ip))
                .collect();
            ensure!(heard.len() >= GREETINGS, "{ip}: {heard:#?}");
            for line in heard {
                self.ensure_end(line, "src", &tenant.name)?;
            }
        }
        Ok(())
    }

    fn ensure_end(&self, line: &str, end: &str, pod: &str) -> Result<()> {
        let namespace = &self.namespace.name;
        let wanted = format!("spiffe://cluster.local/ns/{namespace}/sa/{pod}");
        let logged = field(line, &format!("{end}.identity"));
        ensure!(logged == Some(&wanted), "{end} was {pod}: {line}");
        Ok(())
    }
}

impl Made {
    fn read(from: &str, seen: &Value) -> Result<Self> {
        let text = |field: &str| {
            let text = seen[field].as_str();
            text.with_context(|| format!("{field}: {seen}"))
        };
        Ok(Self {
            ends: [text("own")?.parse()?, text("to")?.parse()?],
            from: from.to_owned(),
            to: text("pod")?.to_owned(),
        })
    }
}

/// Source and destination of a line of the access log.
fn ends(line: &str) -> Option<[SocketAddr; 2]> {
    let address = |name| field(line, name)?.parse().ok();
    Some([address("src.addr")?, address("dst.addr")?])
}

/// A field of a line of the access log.
fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = line.split_once(&format!(" {name}="))?;
    rest.split(' ').next()
}

fn joined<T>(thread: thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().ok().context("a thread panicked")?
}

#[test]
fn nobody_is_taken_for_whoever_had_the_address_before() -> Result<()> {
    recorded("address_reuse", |_, numbers: &mut Numbers| {
        let street = Street::new()?;
        let wanted = count(8, 1000);
        let first = (0..HOUSES).map(|house| street.move_in(tenant(house, 0)));
        let mut tenants: Vec<Tenant> = first.collect::<Result<_>>()?;
        let mut turn = 0;
        while numbers.reused < wanted {
            turn += 1;
            // Pods of earlier tests may go meanwhile, and leave lower addresses.
            ensure!(turn < 10 + wanted, "{numbers:?} in {turn} turns");
            let since = now()?;
            let (next, asked) = street.change(&tenants, turn)?;
            street.ensure_known(&asked.made, &next, &since)?;
            let free: BTreeSet<IpAddr> = tenants.iter().flat_map(|old| old.ips.clone()).collect();
            let inherits = |next: &&Tenant| next.ips.iter().all(|ip| free.contains(ip));
            numbers.reused += next.iter().filter(inherits).count();
            numbers.connections += asked.made.len();
            numbers.failed += asked.failed;
            tenants = next;
        }
        Ok(())
    })
}
