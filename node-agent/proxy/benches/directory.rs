//! A proxy that knows a cluster of 100,000 pods: prints the numbers, and fails when one is over its limit.
//!
//! ```text
//!  lookup    the workload that has an address
//!  memory    of the program: once it knows all, and the most that it ever took
//!  answer    there and back on a connection that it carries: idle, and while all is told anew
//! ```
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    dead_code,
    reason = "this is a benchmark; it uses a part of the tests' agent and controller"
)]

#[path = "../tests/program/agent.rs"]
mod agent;
#[path = "../tests/program/controller.rs"]
mod controller;
#[path = "../tests/program/program.rs"]
mod program;

use std::hint::black_box;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use agent::Agent;
use controller::{Controller, resource};
use hbone::directory::{Directory, Locality, Workload};
use hbone::identity::{SpiffeId, TrustDomain};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use program::{Program, in_namespace_for};
use protocol::discovery::Resource;
use protocol::workload as proto;
use protocol::{ADDRESS_TYPE, AUTHORIZATION_TYPE};

const WORKLOADS: u32 = 100_000;
const SERVICES: u32 = 2_000;
const NODES: u32 = 1_000;
/// What a controller puts into one response, in bytes.
const RESPONSE: usize = 1 << 20;
/// How often all is told anew.
const ROUNDS: usize = 5;
const LOOKUPS: u32 = 2_000_000;

const LOOKUP: Duration = Duration::from_micros(1);
const MEMORY: usize = 250 << 20;
const STALL: Duration = Duration::from_millis(5);

/// The pod whose connection is looked at, and what it talks to.
const CLIENT: (&str, Ipv4Addr) = ("client-uid", Ipv4Addr::new(10, 1, 0, 1));
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 1);
/// Mark of what is redirected to the proxy.
const FROM_POD: u32 = 0x777;

fn main() -> ExitCode {
    println!("{WORKLOADS} workloads, {SERVICES} services");
    let known = lookup();
    let carried = in_namespace_for(Duration::from_mins(5), carry);
    if known && carried {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

// === lookup ===

fn lookup() -> bool {
    let directory = full();
    // Each address once in an order that no cache foresees: the step has no factor in common with their number.
    let step = 37_633;
    let start = Instant::now();
    for index in 0..LOOKUPS {
        let address = address(index.wrapping_mul(step) % WORKLOADS);
        assert!(black_box(directory.workload_at(black_box(address.into()))).is_some());
    }
    let took = start.elapsed() / LOOKUPS;
    verdict(
        "lookup",
        &format!("{} ns", took.as_nanos()),
        took < LOOKUP,
        "1 µs",
    )
}

fn full() -> Directory {
    let domain = TrustDomain::new("cluster.local").unwrap();
    let mut directory = Directory::default();
    for index in 0..WORKLOADS {
        let uid: Arc<str> = uid(index).into();
        let service = service(index).into();
        directory.put_workload(Workload {
            name: uid.clone(),
            namespace: "shop".into(),
            service_account: "default".into(),
            hbone: Some(SpiffeId::new(&domain, "shop", "default").unwrap()),
            addresses: vec![address(index).into()],
            host_network: false,
            node: node(index).into(),
            network: "".into(),
            healthy: true,
            locality: Locality::default(),
            workload_name: uid.clone(),
            workload_type: "deployment",
            canonical_name: uid.clone(),
            canonical_revision: "latest".into(),
            cluster: "Kubernetes".into(),
            services: Arc::new([(service, [(80, 8080)].into())].into()),
            policies: Vec::new(),
            uid,
        });
    }
    directory
}

// === a proxy that is told all of it ===

async fn carry(program: &Program) -> bool {
    redirect();
    let mut controller = Controller::start(program).await;
    let mut agent = Agent::start(program).await;
    agent.hello().await;
    let (uid, ip) = CLIENT;
    agent.configure(1, &[(uid, "web", &ip.to_string())]).await;
    controller
        .accept(&[(
            ADDRESS_TYPE,
            vec![controller::workload(uid, "web", &ip.to_string())],
        )])
        .await;
    controller.accept(&[(AUTHORIZATION_TYPE, Vec::new())]).await;
    controller.accept(&services()).await;
    tell_all(&mut controller, 0).await;

    let idle = Pinging::start(serve());
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (stream, idle) = idle.stop();
    idle.print("answer, idle");
    let settled = memory(program, "VmRSS");

    let (mut stream, mut longest) = (stream, Duration::MAX);
    for round in 1..=ROUNDS {
        let pinging = Pinging::start(stream);
        let start = Instant::now();
        tell_all(&mut controller, round).await;
        let took = start.elapsed();
        let (back, answers) = pinging.stop();
        answers.print(&format!("answer, told anew in {:.1} s", took.as_secs_f64()));
        stream = back;
        // What else runs on the machine only ever makes it longer.
        longest = longest.min(answers.longest());
    }
    let most = memory(program, "VmHWM");
    let mib = |bytes: usize| format!("{} MiB", bytes >> 20);
    [
        verdict(
            "longest answer of the best round",
            &format!("{longest:.1?}"),
            longest < STALL,
            "5 ms",
        ),
        verdict("memory", &mib(settled), settled < MEMORY, "250 MiB"),
        verdict("memory, the most", &mib(most), most < MEMORY, "250 MiB"),
    ]
    .iter()
    .all(|within| *within)
}

/// A field of proc_pid_status(5) that is in KiB, in bytes.
fn memory(program: &Program, field: &str) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", program.pid)).unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    let kib: usize = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib * 1024
}

/// Tells everything, each time with other content.
async fn tell_all(controller: &mut Controller, round: usize) {
    let (mut part, mut bytes) = (Vec::new(), 0);
    for index in 0..WORKLOADS {
        let told = workload(index, round);
        bytes += told.resource.as_ref().unwrap().value.len() + told.name.len();
        part.push(told);
        if bytes > RESPONSE || index + 1 == WORKLOADS {
            controller
                .accept(&[(ADDRESS_TYPE, std::mem::take(&mut part))])
                .await;
            bytes = 0;
        }
    }
}

fn workload(index: u32, round: usize) -> Resource {
    let uid = uid(index);
    let ports = proto::PortList {
        ports: vec![proto::Port {
            service_port: 80,
            target_port: 8080,
            ..proto::Port::default()
        }],
    };
    let workload = proto::Workload {
        uid: uid.clone(),
        name: format!("web-{index}"),
        namespace: "shop".to_owned(),
        addresses: vec![address(index).octets().to_vec().into()],
        tunnel_protocol: proto::TunnelProtocol::Hbone.into(),
        trust_domain: "cluster.local".to_owned(),
        service_account: "default".to_owned(),
        node: node(index),
        canonical_name: "web".to_owned(),
        canonical_revision: format!("revision-{round}"),
        workload_name: format!("web-{}", index % SERVICES),
        cluster_id: "Kubernetes".to_owned(),
        services: [(service(index), ports)].into(),
        ..proto::Workload::default()
    };
    let address = proto::Address {
        r#type: Some(proto::address::Type::Workload(workload)),
    };
    resource(&uid, ADDRESS_TYPE, &address)
}

fn services() -> [(&'static str, Vec<Resource>); 1] {
    let all = (0..SERVICES).map(|index| {
        let name = service(index);
        let hostname = name.split_once('/').unwrap().1.to_owned();
        let vip = Ipv4Addr::from_bits(Ipv4Addr::new(10, 96, 0, 0).to_bits() + index);
        let service = proto::Service {
            name: format!("web-{index}"),
            namespace: "shop".to_owned(),
            hostname,
            addresses: vec![proto::NetworkAddress {
                address: vip.octets().to_vec(),
                ..proto::NetworkAddress::default()
            }],
            ports: vec![proto::Port {
                service_port: 80,
                target_port: 8080,
                ..proto::Port::default()
            }],
            ..proto::Service::default()
        };
        let address = proto::Address {
            r#type: Some(proto::address::Type::Service(service)),
        };
        resource(&name, ADDRESS_TYPE, &address)
    });
    [(ADDRESS_TYPE, all.collect())]
}

fn uid(index: u32) -> String {
    format!("{index:08x}-1111-4222-8333-444444444444")
}

fn address(index: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(10, 128, 0, 0).to_bits() + index)
}

fn node(index: u32) -> String {
    format!("node-{}.example.internal", index % NODES)
}

fn service(index: u32) -> String {
    format!("shop/web-{}.shop.svc.cluster.local", index % SERVICES)
}

// === the connection that is looked at ===

fn redirect() {
    for command in [
        // No device has the address: it is not the proxy's own.
        format!("ip route add local {SERVER}/32 dev lo"),
        format!(
            "iptables -t mangle -A PREROUTING -i lo -p tcp -m mark --mark {FROM_POD} \
             -j TPROXY --on-ip 127.0.0.1 --on-port 15001 --tproxy-mark 0x400/0xfff"
        ),
    ] {
        let mut words = command.split_whitespace();
        let mut program = std::process::Command::new(words.next().unwrap());
        assert!(program.args(words).status().unwrap().success(), "{command}");
    }
}

/// A server that sends back what it gets, and the pod's connection to it.
fn serve() -> TcpStream {
    let listener = TcpListener::bind((SERVER, 8080)).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_nodelay(true).unwrap();
        let mut byte = [0];
        while stream.read_exact(&mut byte).is_ok() {
            stream.write_all(&byte).unwrap();
        }
    });
    let client = socket(
        AddressFamily::Inet,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    setsockopt(&client, sockopt::Mark, &FROM_POD).unwrap();
    let address = |ip: Ipv4Addr, port| SockaddrStorage::from(SocketAddr::new(IpAddr::V4(ip), port));
    bind(client.as_raw_fd(), &address(CLIENT.1, 0)).unwrap();
    connect(client.as_raw_fd(), &address(SERVER, 8080)).unwrap();
    let stream = TcpStream::from(client);
    stream.set_nodelay(true).unwrap();
    stream
}

/// A byte goes there and back, again and again.
struct Pinging {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(TcpStream, Answers)>,
}

/// What each way there and back took, the shortest first.
struct Answers(Vec<Duration>);

impl Pinging {
    fn start(mut stream: TcpStream) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut all = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                let start = Instant::now();
                stream.write_all(&[1]).unwrap();
                stream.read_exact(&mut [0]).unwrap();
                all.push(start.elapsed());
                std::thread::sleep(Duration::from_micros(200));
            }
            all.sort();
            (stream, Answers(all))
        });
        Self { stop, thread }
    }

    fn stop(self) -> (TcpStream, Answers) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

impl Answers {
    fn longest(&self) -> Duration {
        *self.0.last().unwrap()
    }

    fn print(&self, what: &str) {
        let at = |of_thousand: usize| self.0[(self.0.len() * of_thousand).div_ceil(1000) - 1];
        println!(
            "  {what}: median {:.1?}, 99.9 % {:.1?}, longest {:.1?} of {}",
            at(500),
            at(999),
            self.longest(),
            self.0.len()
        );
    }
}

fn verdict(what: &str, shown: &str, is_within: bool, limit: &str) -> bool {
    let word = if is_within { "within" } else { "OVER" };
    println!("  {what}: {shown}, {word} {limit}");
    is_within
}
