//! The plugin as a container runtime calls it, on a host in network namespaces; read back with ip(8), and
//! with what a pod's packets do.
#![allow(clippy::unwrap_used, reason = "this is a test")]

#[path = "../../datapath/tests/bed/mod.rs"]
mod bed;

use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use bed::{Bed, HOST, PODS, ipv6_of};
use datapath::IptablesBackend;
use guard::orders::Orders;
use guard::record;
use serde_json::{Value, json};

const UID: &str = "0b1c-uid";

/// A host with the plugin's files.
struct Host {
    bed: Bed,
    folder: tempfile::TempDir,
}

impl Host {
    fn new(bed: Bed) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let host = Self { bed, folder };
        host.order(&["shop"]);
        host
    }

    fn order(&self, namespaces: &[&str]) {
        let orders = Orders {
            priority: 99,
            protocol: 90,
            records: self.records(),
            namespaces: namespaces.iter().map(ToString::to_string).collect(),
        };
        orders.write(&self.orders()).unwrap();
    }

    fn orders(&self) -> PathBuf {
        self.folder.path().join("guard.json")
    }

    fn records(&self) -> PathBuf {
        self.folder.path().join("held")
    }

    fn result(&self) -> Value {
        json!({
            "cniVersion": "1.0.0",
            "interfaces": [{"name": "va"}, {"name": "eth0", "sandbox": "x"}],
            "ips": [
                {"address": format!("{}/32", PODS[0]), "interface": 1},
                {"address": format!("{}/128", ipv6_of(PODS[0])), "interface": 1},
            ],
        })
    }

    /// Calls the plugin for the device of pod `a`: whether it succeeded, and what it said.
    fn call(&self, command: &str, namespace: &str, uid: &str) -> (bool, Value) {
        let netns = format!("/run/netns/{}", self.bed.name("a"));
        let configuration = json!({
            "cniVersion": "1.0.0",
            "name": "bed",
            "type": guard::PROGRAM,
            "orders": self.orders(),
            "unheld": ["ambit-system"],
            "prevResult": self.result(),
        });
        let mut plugin = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", self.bed.name("host")))
            .arg(env!("CARGO_BIN_EXE_ambit-cni"))
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", "sandbox")
            .env("CNI_IFNAME", "eth0")
            .env("CNI_NETNS", netns)
            .env(
                "CNI_ARGS",
                format!("K8S_POD_NAMESPACE={namespace};K8S_POD_NAME=web;K8S_POD_UID={uid}"),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = plugin.stdin.take().unwrap();
        input
            .write_all(configuration.to_string().as_bytes())
            .unwrap();
        drop(input);
        let output = plugin.wait_with_output().unwrap();
        let said = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
        (output.status.success(), said)
    }

    fn add(&self, namespace: &str) -> (bool, Value) {
        self.call("ADD", namespace, UID)
    }

    fn holds(&self) -> String {
        let rules = self.bed.run("host", "ip rule; ip -6 rule");
        let held = rules.lines().filter(|line| line.starts_with("99:"));
        held.collect::<Vec<_>>().join("\n")
    }

    /// Whether pod `a` gets a connection.
    fn connects(&self, to: SocketAddr, within: Duration) -> bool {
        let connect = || TcpStream::connect_timeout(&to, within).is_ok();
        self.bed.netns("a").run(connect).unwrap()
    }
}

/// A pod's first packets: those to other pods wait, those to its host and of UDP do not.
#[test]
fn tcp_of_a_pod_of_the_mesh_is_held_and_nothing_else() {
    let host = Host::new(Bed::dual(IptablesBackend::Nft));
    let (short, long) = (Duration::from_millis(300), Duration::from_secs(10));
    let servers: Vec<TcpListener> = [PODS[1].into(), ipv6_of(PODS[1]).into()]
        .map(|ip: std::net::IpAddr| {
            let listen = || TcpListener::bind((ip, 9000)).unwrap();
            host.bed.netns("b").run(listen).unwrap()
        })
        .into();
    let to: Vec<SocketAddr> = servers.iter().map(|it| it.local_addr().unwrap()).collect();
    assert!(to.iter().all(|to| host.connects(*to, long)));

    assert_eq!(host.add("shop"), (true, host.result()));
    assert_eq!(
        host.holds(),
        "99:\tfrom 10.244.1.4 iif va ipproto tcp blackhole proto 90\n\
         99:\tfrom fd00:244:1::4 iif va ipproto tcp blackhole proto 90"
    );
    assert!(to.iter().all(|to| !host.connects(*to, short)));
    let udp = host
        .bed
        .netns("b")
        .run(|| UdpSocket::bind((PODS[1], 9000)).unwrap())
        .unwrap();
    udp.set_read_timeout(Some(long)).unwrap();
    let send = || {
        UdpSocket::bind("0.0.0.0:0")
            .unwrap()
            .send_to(b"x", (PODS[1], 9000))
            .unwrap()
    };
    host.bed.netns("a").run(send).unwrap();
    assert!(udp.recv(&mut [0; 8]).is_ok(), "UDP is held");
    // The host's own addresses, and its way to the pod: kubelet's probes.
    let listen = |netns: &str, ip: &str| {
        let bind = || TcpListener::bind((ip, 8080)).unwrap();
        host.bed.netns(netns).run(bind).unwrap()
    };
    let own = listen("host", HOST);
    assert!(host.connects(own.local_addr().unwrap(), long));
    let probed = listen("a", &PODS[0].to_string());
    host.bed.connect("host", probed.local_addr().unwrap());

    // A connection that waits goes on with its next packet, a second after the first, once it may.
    let waiting = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| host.connects(to[0], long));
        std::thread::sleep(short);
        assert!(host.call("DEL", "shop", UID).0);
        waiting.join().unwrap()
    });
    assert!(waiting, "its first packet was not repeated, or refused");
    assert_eq!(host.holds(), "");
    assert_eq!(record::all(&host.records()).unwrap(), []);
    assert!(host.call("DEL", "shop", UID).0, "a second time");
}

#[test]
fn of_other_pods_it_hands_on_the_result_whatever_the_rest_is() {
    let host = Host::new(Bed::new(IptablesBackend::Nft));
    let untouched = |namespace: &str, uid: &str| {
        assert_eq!(
            host.call("ADD", namespace, uid),
            (true, host.result()),
            "{namespace} {uid}"
        );
        assert_eq!(host.holds(), "");
    };
    untouched("plain", UID);
    untouched("ambit-system", UID);
    // A static pod.
    untouched("shop", "0123456789abcdef0123456789abcdef");
    std::fs::remove_file(host.orders()).unwrap();
    untouched("shop", UID);
    // Who is in the mesh cannot be told: only what is never held starts.
    std::fs::write(host.orders(), "{").unwrap();
    untouched("ambit-system", UID);
    let (succeeded, said) = host.add("plain");
    assert!(!succeeded);
    assert_eq!(said["code"], 11);
    assert!(
        said["msg"].as_str().unwrap().contains("guard.json"),
        "{said}"
    );
    assert!(host.call("DEL", "plain", UID).0);
    assert_eq!(record::all(&host.records()).unwrap(), []);
}

#[test]
fn behind_a_bridge_the_bridge_is_the_way_in() {
    let host = Host::new(Bed::new(IptablesBackend::Nft));
    host.bed.run(
        "host",
        "ip link add cni0 type bridge; ip link set cni0 up; ip link set va master cni0",
    );
    assert!(host.add("shop").0);
    assert!(
        host.holds()
            .contains("from 10.244.1.4 iif cni0 ipproto tcp"),
        "{}",
        host.holds()
    );
}

#[test]
fn a_pod_that_cannot_be_held_does_not_start() {
    let host = Host::new(Bed::new(IptablesBackend::Nft));
    host.bed
        .run("a", "ip link delete eth0; ip link add eth0 type bridge");
    let (succeeded, said) = host.add("shop");
    assert!(!succeeded);
    let details = said["details"].as_str().unwrap();
    assert!(details.contains("veth"), "{said}");
    assert_eq!(host.holds(), "");
    assert!(host.add("plain").0);
}
