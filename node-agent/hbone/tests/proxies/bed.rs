//! Two nodes' proxies in one private network namespace, in this process.
//!
//! ```text
//!  client 10.1.0.1 ──mark──▶ TPROXY 15001 ─ near proxy ──▶ 10.2.0.1:15008 ─ far proxy ──▶ 10.2.0.1:8080
//! client fd00:1::1 ──mark──▶ TPROXY 15001 ─ near proxy ─▶ [fd00:2::1]:15008 ─ far proxy ─▶ [fd00:2::1]:8080
//! ```
//!
//! A test runs once for each family, in a namespace that has only this one, or once in a namespace
//! that has both. All addresses lead to the loopback device. Only what carries the mark of a pod's own connections is
//! redirected, so that the proxies' dials to the same addresses are not.

pub(crate) mod authority;
pub(crate) mod host;
pub(crate) mod log;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use authority::Authority;
use hbone::directory::{Balancing, Directory, Locality, Service, Workload};
use hbone::identity::{SpiffeId, TrustDomain};
use hbone::local::{LocalWorkload, LocalWorkloads};
use hbone::{ListenerKind, Server, Settings, Shared};
pub(crate) use host::{Families, Host};
use nix::sched::{CloneFlags, unshare};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinHandle;

pub(crate) const CLIENT: Host = Host::new(1, 1);
pub(crate) const NEIGHBOUR: Host = Host::new(1, 2);
pub(crate) const SERVER: Host = Host::new(2, 1);
pub(crate) const PROXY: Host = Host::new(3, 1);
pub(crate) const VIP: Host = Host::new(9, 1);
pub(crate) const OUTSIDE: Host = Host::new(9, 9);

/// Mark of a pod's connection, and of one from outside the mesh to a pod.
const FROM_POD: u32 = 0x777;
const TO_POD: u32 = 0x778;

/// A program has replaced itself by another within this time.
const HELD: Duration = Duration::from_secs(5);

/// Runs a test for each family, each time in a network namespace of its own, which goes with it.
pub(crate) fn in_namespace<F>(test: impl Fn() -> F + Send + Copy + 'static)
where
    F: Future<Output = ()>,
{
    in_namespace_of(Families::V4, test);
    in_namespace_of(Families::V6, test);
}

/// Runs a test where pods and services have an address of each family.
pub(crate) fn in_dual_stack_namespace<F>(test: impl Fn() -> F + Send + 'static)
where
    F: Future<Output = ()>,
{
    in_namespace_of(Families::Both, test);
}

fn in_namespace_of<F>(families: Families, test: impl Fn() -> F + Send + 'static)
where
    F: Future<Output = ()>,
{
    // The name shows in what a test that fails says.
    let thread = std::thread::Builder::new().name(format!("{families:?}"));
    let thread = thread.spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
        families.choose();
        prepare(families);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.unwrap().block_on(async {
            tokio::time::timeout(Duration::from_secs(60), test())
                .await
                .expect("the test hangs");
        });
    });
    if let Err(panic) = thread.unwrap().join() {
        std::panic::resume_unwind(panic);
    }
}

fn prepare(families: Families) {
    if families == Families::V4 {
        std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
    }
    run("ip link set lo up");
    for host in [NEIGHBOUR, SERVER, VIP, OUTSIDE, PROXY] {
        for ip in host.addresses() {
            // An address of IPv6 is to be there at once.
            let flags = if ip.is_ipv6() { "nodad" } else { "" };
            run(&format!("ip address add {ip} dev lo {flags}"));
        }
    }
    for ip in CLIENT.addresses() {
        // No device has it, as the proxies do not have the pods': only transparent sockets can.
        run(&format!("ip route add local {ip} dev lo"));
    }
    for (mark, port) in [(FROM_POD, 15001), (TO_POD, 15006)] {
        for (program, on_ip) in families.tproxy() {
            run(&format!(
                "{program} -t mangle -A PREROUTING -i lo -p tcp -m mark --mark {mark} \
                 -j TPROXY --on-ip {on_ip} --on-port {port} --tproxy-mark 0x400/0xfff"
            ));
        }
    }
}

pub(crate) fn run(command: &str) {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap())
        .args(words)
        .output()
        .unwrap();
    assert!(output.status.success(), "{command}: {output:?}");
}

pub(crate) fn at(ip: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(ip.into(), port)
}

pub(crate) fn identity(account: &str) -> SpiffeId {
    SpiffeId::new(&TrustDomain::new("td").unwrap(), "shop", account).unwrap()
}

/// A pod of a node. Its service account has its name.
pub(crate) fn pod(name: &str, host: Host) -> LocalWorkload {
    LocalWorkload {
        uid: name.into(),
        namespace: "shop".into(),
        name: name.into(),
        identity: identity(name),
        addresses: host.addresses(),
    }
}

/// What the controller says about a pod; port 80 of `shop/web` is its 8080.
pub(crate) fn workload(name: &str, host: Host) -> Workload {
    Workload {
        uid: name.into(),
        name: name.into(),
        namespace: "shop".into(),
        service_account: name.into(),
        hbone: Some(identity(name)),
        addresses: host.addresses(),
        host_network: false,
        node: "".into(),
        network: "".into(),
        healthy: true,
        locality: Locality::default(),
        workload_name: name.into(),
        workload_type: "pod",
        canonical_name: name.into(),
        canonical_revision: "latest".into(),
        cluster: "Kubernetes".into(),
        services: Arc::default(),
        policies: Vec::new(),
    }
}

pub(crate) fn endpoint(name: &str, host: Host) -> Workload {
    Workload {
        services: Arc::new([("shop/web".into(), [(80, 8080)].into())].into()),
        ..workload(name, host)
    }
}

pub(crate) fn service() -> Service {
    Service {
        key: "shop/web".into(),
        name: "web".into(),
        namespace: "shop".into(),
        hostname: "web.shop.svc.cluster.local".into(),
        addresses: VIP.addresses(),
        ports: BTreeMap::from([(80, 8080)]),
        balancing: Balancing::default(),
    }
}

/// The whole mesh as the controller knows it.
pub(crate) fn directory() -> Directory {
    let mut directory = Directory::default();
    directory.put_workload(workload("client", CLIENT));
    directory.put_workload(workload("neighbour", NEIGHBOUR));
    directory.put_workload(endpoint("server", SERVER));
    directory.put_service(service());
    directory
}

/// The proxy of a node.
pub(crate) struct Node {
    pub(crate) shared: Arc<Shared>,
    pub(crate) server: Server,
    pub(crate) registry: Registry,
}

impl Node {
    /// With these pods, their certificates, and the whole directory; listening.
    pub(crate) async fn new(
        authority: &Arc<Authority>,
        pods: impl IntoIterator<Item = LocalWorkload>,
        listeners: &[(ListenerKind, u16)],
    ) -> Self {
        let node = Self::undiscovered(authority, pods, listeners).await;
        node.shared.directory.store(Arc::new(directory()));
        node.shared.set_discovered();
        node
    }

    /// The same, but the controller has said nothing yet.
    pub(crate) async fn undiscovered(
        authority: &Arc<Authority>,
        pods: impl IntoIterator<Item = LocalWorkload>,
        listeners: &[(ListenerKind, u16)],
    ) -> Self {
        let mut registry = Registry::default();
        let settings = Settings {
            trust_domain: TrustDomain::new("td").unwrap(),
            cluster: "Kubernetes".to_owned(),
        };
        let shared = Shared::new(settings, &mut registry);
        shared.own_addresses.store(Arc::new(PROXY.addresses()));
        let node = Self {
            server: Server::new(shared.clone()),
            shared,
            registry,
        };
        node.set_pods(authority, pods).await;
        node.listen(listeners);
        node
    }

    pub(crate) fn listen(&self, listeners: &[(ListenerKind, u16)]) {
        let wanted = BTreeSet::from_iter(listeners.iter().copied());
        once_free::<()>(|| self.server.listen(&wanted).into_values().collect());
    }

    pub(crate) async fn set_pods(
        &self,
        authority: &Arc<Authority>,
        pods: impl IntoIterator<Item = LocalWorkload>,
    ) {
        let pods: LocalWorkloads = pods.into_iter().collect();
        let identities = pods.identities();
        self.shared.local.store(Arc::new(pods));
        let certificates = &self.shared.certificates;
        let mut changes = certificates.changes();
        certificates.want(&identities, authority);
        while !identities.iter().all(|id| certificates.get(id).is_some()) {
            changes.changed().await.unwrap();
        }
    }

    /// The lines of a metric, as they are scraped.
    pub(crate) fn metric(&self, name: &str) -> String {
        let mut text = String::new();
        encode(&mut text, &self.registry).unwrap();
        let lines = text.lines().filter(|line| line.starts_with(name));
        lines.collect::<Vec<_>>().join("\n")
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut Directory)) {
        let mut directory = Directory::clone(&self.shared.directory.load());
        change(&mut directory);
        self.shared.directory.store(Arc::new(directory));
        self.shared.sweep();
    }
}

/// The client's node and the server's.
pub(crate) struct Mesh {
    pub(crate) authority: Arc<Authority>,
    pub(crate) near: Node,
    pub(crate) far: Node,
}

pub(crate) const NEAR: [(ListenerKind, u16); 1] = [(ListenerKind::Outbound, 15001)];
pub(crate) const FAR: [(ListenerKind, u16); 2] = [
    (ListenerKind::Inbound, 15008),
    (ListenerKind::InboundPlaintext, 15006),
];

impl Mesh {
    pub(crate) async fn new() -> Self {
        let authority = Authority::new("the root");
        let pods = [pod("client", CLIENT), pod("neighbour", NEIGHBOUR)];
        Self {
            near: Node::new(&authority, pods, &NEAR).await,
            far: Node::new(&authority, [pod("server", SERVER)], &FAR).await,
            authority,
        }
    }
}

/// Does what needs a port. A program that another test starts has every socket of this process until its exec,
/// so that a port that was closed is in use for a moment longer.
pub(crate) fn once_free<T>(mut work: impl FnMut() -> io::Result<T>) -> T {
    let start = Instant::now();
    loop {
        match work() {
            Ok(done) => return done,
            Err(error) if error.kind() == ErrorKind::AddrInUse && start.elapsed() < HELD => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// A socket with an address that need not be a device's.
fn bound(from: SocketAddr) -> Socket {
    let socket = Socket::new(Domain::for_address(from), Type::STREAM, None).unwrap();
    match from {
        SocketAddr::V4(_) => socket.set_freebind_v4(true).unwrap(),
        SocketAddr::V6(_) => socket.set_freebind_v6(true).unwrap(),
    }
    socket.set_tcp_nodelay(true).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket.bind(&from.into()).unwrap();
    socket
}

async fn connect(from: SocketAddr, mark: u32, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = bound(from);
    socket.set_mark(mark).unwrap();
    TcpSocket::from_std_stream(socket.into()).connect(to).await
}

/// A pod's connection, as its node redirects it.
pub(crate) async fn dial(from: impl Into<IpAddr>, to: SocketAddr) -> io::Result<TcpStream> {
    dial_from(at(from, 0), to).await
}

/// The same, from this very port.
pub(crate) async fn dial_from(from: SocketAddr, to: SocketAddr) -> io::Result<TcpStream> {
    connect(from, FROM_POD, to).await
}

/// A connection from outside the mesh to a pod, as the pod's node redirects it.
pub(crate) async fn dial_plainly(from: impl Into<IpAddr>, to: SocketAddr) -> io::Result<TcpStream> {
    connect(at(from, 0), TO_POD, to).await
}

/// A connection that nothing redirects.
pub(crate) async fn dial_directly(
    from: impl Into<IpAddr>,
    to: SocketAddr,
) -> io::Result<TcpStream> {
    connect(at(from, 0), 0, to).await
}

/// Says to every client who it is, then echoes.
pub(crate) async fn serve_echo(ip: impl Into<IpAddr>, port: u16) -> JoinHandle<()> {
    let socket = bound(at(ip, port));
    socket.listen(128).unwrap();
    let listener = TcpListener::from_std(socket.into()).unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, peer) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let greeting = format!("{}\n", peer.ip());
                stream.write_all(greeting.as_bytes()).await?;
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await?;
                write.shutdown().await
            });
        }
    })
}

/// What a client gets that has sent this text.
pub(crate) fn greeting(ip: impl Into<IpAddr>, text: &str) -> String {
    format!("{}\n{text}", ip.into())
}

/// Takes the greeting that an echo server begins with.
pub(crate) async fn greeted(stream: &mut TcpStream, ip: impl Into<IpAddr>) {
    let expected = greeting(ip, "");
    let mut begun = vec![0; expected.len()];
    stream.read_exact(&mut begun).await.unwrap();
    assert_eq!(begun, expected.as_bytes());
}

/// Sends a text to an echo server; gives what came back.
pub(crate) async fn talk(mut stream: TcpStream, text: &str) -> io::Result<String> {
    stream.write_all(text.as_bytes()).await?;
    stream.shutdown().await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

/// The error that a refused connection ends with: it must not look like an end.
pub(crate) async fn refusal(dialled: io::Result<TcpStream>) -> io::ErrorKind {
    let stream = match dialled {
        Ok(stream) => stream,
        Err(error) => return error.kind(),
    };
    match talk(stream, "is anybody there?").await {
        Ok(answer) => panic!("it was not refused: {answer:?}"),
        Err(error) => error.kind(),
    }
}
