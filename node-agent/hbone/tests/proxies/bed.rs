//! Two nodes' proxies in one private network namespace, in this process.
//!
//! ```text
//!  client 10.1.0.1 ──mark──▶ TPROXY 15001 ─ near proxy ──▶ 10.2.0.1:15008 ─ far proxy ──▶ 10.2.0.1:8080
//! ```
//!
//! All addresses are on the loopback device. Only what carries the mark of a pod's own connections is
//! redirected, so that the proxies' dials to the same addresses are not.

pub(crate) mod authority;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use authority::Authority;
use hbone::directory::{Balancing, Directory, Locality, Service, Workload};
use hbone::identity::{SpiffeId, TrustDomain};
use hbone::local::{LocalWorkload, LocalWorkloads};
use hbone::{ListenerKind, Server, Settings, Shared};
use nix::sched::{CloneFlags, unshare};
use prometheus_client::registry::Registry;
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinHandle;

pub(crate) const CLIENT: &str = "10.1.0.1";
pub(crate) const NEIGHBOUR: &str = "10.1.0.2";
pub(crate) const SERVER: &str = "10.2.0.1";
pub(crate) const VIP: &str = "10.9.0.1";
pub(crate) const OUTSIDE: &str = "10.9.9.9";
pub(crate) const PROXY: &str = "10.3.0.1";

/// Mark of a pod's connection, and of one from outside the mesh to a pod.
const FROM_POD: u32 = 0x777;
const TO_POD: u32 = 0x778;

/// Runs a test in a network namespace of its own, which goes with it.
pub(crate) fn in_namespace<F>(test: impl FnOnce() -> F + Send + 'static)
where
    F: Future<Output = ()>,
{
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
        run("ip link set lo up");
        for ip in [CLIENT, NEIGHBOUR, SERVER, VIP, OUTSIDE, PROXY] {
            run(&format!("ip address add {ip}/32 dev lo"));
        }
        for (mark, port) in [(FROM_POD, 15001), (TO_POD, 15006)] {
            run(&format!(
                "iptables -t mangle -A PREROUTING -i lo -p tcp -m mark --mark {mark} \
                 -j TPROXY --on-port {port} --tproxy-mark 0x400/0xfff"
            ));
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.unwrap().block_on(async {
            tokio::time::timeout(Duration::from_secs(60), test())
                .await
                .expect("the test hangs");
        });
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn run(command: &str) {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap())
        .args(words)
        .output()
        .unwrap();
    assert!(output.status.success(), "{command}: {output:?}");
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn at(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(self::ip(ip), port)
}

pub(crate) fn identity(account: &str) -> SpiffeId {
    SpiffeId::new(&TrustDomain::new("td").unwrap(), "shop", account).unwrap()
}

/// A pod of a node. Its service account has its name.
pub(crate) fn pod(name: &str, ip: &str) -> LocalWorkload {
    LocalWorkload {
        uid: name.into(),
        namespace: "shop".into(),
        name: name.into(),
        identity: identity(name),
        addresses: vec![self::ip(ip)],
    }
}

/// What the controller says about a pod; port 80 of `shop/web` is its 8080.
pub(crate) fn workload(name: &str, ip: &str) -> Workload {
    Workload {
        uid: name.into(),
        name: name.into(),
        namespace: "shop".into(),
        service_account: name.to_owned(),
        hbone: Some(identity(name)),
        addresses: vec![self::ip(ip)],
        host_network: false,
        node: String::new(),
        network: String::new(),
        healthy: true,
        locality: Locality::default(),
        workload_name: name.into(),
        workload_type: "pod",
        canonical_name: name.into(),
        canonical_revision: "latest".to_owned(),
        cluster: "Kubernetes".to_owned(),
        services: BTreeMap::new(),
        policies: Vec::new(),
    }
}

pub(crate) fn endpoint(name: &str, ip: &str) -> Workload {
    Workload {
        services: BTreeMap::from([("shop/web".into(), BTreeMap::from([(80, 8080)]))]),
        ..workload(name, ip)
    }
}

pub(crate) fn service() -> Service {
    Service {
        key: "shop/web".into(),
        name: "web".into(),
        namespace: "shop".into(),
        hostname: "web.shop.svc.cluster.local".into(),
        addresses: vec![ip(VIP)],
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
        shared.own_addresses.store(Arc::new(vec![ip(PROXY)]));
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
        for (listener, bound) in self.server.listen(&wanted) {
            bound.unwrap_or_else(|error| panic!("{listener:?}: {error}"));
        }
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

fn bound(from: &str, mark: u32) -> TcpSocket {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_mark(mark).unwrap();
    socket.set_tcp_nodelay(true).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket.bind(&at(from, 0).into()).unwrap();
    TcpSocket::from_std_stream(socket.into())
}

/// A pod's connection, as its node redirects it.
pub(crate) async fn dial(from: &str, to: SocketAddr) -> io::Result<TcpStream> {
    bound(from, FROM_POD).connect(to).await
}

/// A connection from outside the mesh to a pod, as the pod's node redirects it.
pub(crate) async fn dial_plainly(from: &str, to: SocketAddr) -> io::Result<TcpStream> {
    bound(from, TO_POD).connect(to).await
}

/// A connection that nothing redirects.
pub(crate) async fn dial_directly(from: &str, to: SocketAddr) -> io::Result<TcpStream> {
    bound(from, 0).connect(to).await
}

/// Says to every client who it is, then echoes.
pub(crate) async fn serve_echo(ip: &str, port: u16) -> JoinHandle<()> {
    let listener = TcpListener::bind(at(ip, port)).await.unwrap();
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
