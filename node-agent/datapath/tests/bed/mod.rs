//! A node in network namespaces of its own: a host, pods behind veth pairs, a proxy pod.
#![allow(dead_code, reason = "whoever uses it uses a part of it")]

pub(crate) mod converge;
pub(crate) mod crowd;
pub(crate) mod dial;
pub(crate) mod foreign;
pub(crate) mod leftovers;
pub(crate) mod read;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use datapath::input::{Ends, Marks, Pair, Ports, Proxy, Tunnel, TunnelEnd};
use datapath::names::Names;
use datapath::netns::Netns;
use datapath::{
    FailureMode, Family, IptablesBackend, MeshPod, NodeInput, PerSlot, Slot, TunnelKind,
};
use nix::sys::socket::{setsockopt, sockopt};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// The host's address towards its pods.
pub(crate) const HOST: &str = "10.244.1.1";
/// Address of the proxy.
pub(crate) const PROXY: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 3);
/// The host's IPv6 address towards its pods, on a bed of both families.
pub(crate) const HOST6: &str = "fd00:244:1::1";
/// Address of the proxy that takes its place.
pub(crate) const NEXT_PROXY: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 9);
/// Addresses of the pods.
pub(crate) const PODS: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 244, 1, 4), Ipv4Addr::new(10, 244, 1, 5)];

/// The namespaces; removed when dropped, also when a test panics.
pub(crate) struct Bed {
    prefix: String,
    names: Vec<String>,
    pub(crate) backend: IptablesBackend,
    is_dual: bool,
}

/// The IPv6 address of whatever has this IPv4 address, on a bed of both families.
pub(crate) fn ipv6_of(ip: Ipv4Addr) -> Ipv6Addr {
    let last = u16::from(ip.octets()[3]);
    Ipv6Addr::new(0xfd00, 0x244, 1, 0, 0, 0, 0, last)
}

impl Bed {
    /// A host with a proxy pod and two pods, of IPv4.
    pub(crate) fn new(backend: IptablesBackend) -> Self {
        Self::of(backend, false)
    }

    /// The same of both families.
    pub(crate) fn dual(backend: IptablesBackend) -> Self {
        Self::of(backend, true)
    }

    fn of(backend: IptablesBackend, is_dual: bool) -> Self {
        leftovers::prevent();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("{}{number}", leftovers::prefix(std::process::id()));
        let mut bed = Self {
            prefix,
            names: Vec::new(),
            backend,
            is_dual,
        };
        let host = bed.add("host");
        if is_dual {
            sh(&format!(
                "ip netns exec {host} sysctl -qw net.ipv6.conf.all.forwarding=1"
            ));
        }
        sh(&format!(
            "ip netns exec {host} sysctl -qw net.ipv4.ip_forward=1"
        ));
        bed.pod("proxy", PROXY);
        for (name, ip) in [("a", PODS[0]), ("b", PODS[1])] {
            bed.pod(name, ip);
        }
        bed
    }

    fn add(&mut self, name: &str) -> String {
        let full = format!("{}-{name}", self.prefix);
        self.names.push(full.clone());
        // Without IPv6, for the kernel's own addresses come when they like, in the middle of a
        // comparison; with it, without the wait for who else may have an address.
        let ipv6 = if self.is_dual {
            "net.ipv6.conf.default.accept_dad=0 net.ipv6.conf.default.accept_ra=0"
        } else {
            "net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1"
        };
        sh(&format!(
            "ip netns add {full}
             ip netns exec {full} sysctl -qw {ipv6}
             ip -n {full} link set lo up"
        ));
        full
    }

    /// A pod as the CNI plugin ptp makes it.
    pub(crate) fn pod(&mut self, name: &str, ip: Ipv4Addr) {
        let pod = self.add(name);
        let host = self.name("host");
        sh(&format!(
            "ip link add eth0 netns {pod} type veth peer name v{name} netns {host}
             ip -n {pod} addr add {ip}/32 dev eth0
             ip -n {pod} link set eth0 up
             ip -n {pod} route add {HOST} dev eth0 scope link
             ip -n {pod} route add default via {HOST}
             ip -n {host} addr add {HOST}/32 dev v{name}
             ip -n {host} link set v{name} up
             ip -n {host} route add {ip}/32 dev v{name} scope host"
        ));
        if self.is_dual {
            let ip = ipv6_of(ip);
            sh(&format!(
                "ip -n {pod} addr add {ip}/128 dev eth0 nodad
                 ip -n {pod} route add {HOST6} dev eth0
                 ip -n {pod} route add default via {HOST6}
                 ip -n {host} addr add {HOST6}/128 dev v{name} nodad
                 ip -n {host} route add {ip}/128 dev v{name}"
            ));
        }
    }

    /// Gives the proxy's pod a device of another kind than a veth.
    pub(crate) fn put_proxy_on_macvlan(&self) {
        let proxy = self.name("proxy");
        self.run(
            "host",
            &format!(
                "ip -n {proxy} link delete eth0
                 ip link add uplink type veth peer name downlink
                 ip link set uplink up
                 ip link add eth0 link uplink netns {proxy} type macvlan mode bridge
                 ip -n {proxy} address add {PROXY}/24 dev eth0
                 ip -n {proxy} link set eth0 up
                 ip -n {proxy} route add default via {HOST}"
            ),
        );
    }

    /// Full name of a namespace.
    pub(crate) fn name(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }

    pub(crate) fn netns(&self, name: &str) -> Netns {
        Netns::open(&format!("/run/netns/{}", self.name(name))).unwrap()
    }

    /// Runs a command in a namespace; what it printed.
    pub(crate) fn run(&self, name: &str, command: &str) -> String {
        sh(&format!(
            "nsenter --net=/run/netns/{} sh -ec '{command}'",
            self.name(name)
        ))
    }

    /// Whether a command succeeds in a namespace.
    pub(crate) fn succeeds(&self, name: &str, command: &str) -> bool {
        let path = format!("--net=/run/netns/{}", self.name(name));
        Command::new("nsenter")
            .args([&path, "sh", "-ec", command])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap()
            .success()
    }

    /// A listener for connections to any address of a family, as the proxy has them.
    pub(crate) fn listen_transparently(
        &self,
        name: &str,
        family: Family,
        port: u16,
    ) -> TcpListener {
        let listen = || {
            let listener = TcpListener::bind((family.everywhere().addr(), port)).unwrap();
            // Both families keep it in the same place.
            setsockopt(&listener, sockopt::IpTransparent, &true).unwrap();
            listener
        };
        self.netns(name).run(listen).unwrap()
    }

    /// A connection from a namespace.
    pub(crate) fn connect(&self, name: &str, to: SocketAddr) -> TcpStream {
        let connect = || TcpStream::connect_timeout(&to, Duration::from_secs(10));
        let connected = self.netns(name).run(connect).unwrap();
        assert!(connected.is_ok(), "{name} to {to}: {connected:?}");
        connected.unwrap()
    }

    /// How many packets the host has sent over a device.
    pub(crate) fn sent_over(&self, device: &str) -> u64 {
        let counters = self.run("host", &format!("grep {device}: /proc/net/dev"));
        // The device, eight counters of what came, bytes sent, packets sent.
        counters
            .split_whitespace()
            .nth(10)
            .unwrap()
            .parse()
            .unwrap()
    }

    pub(crate) fn save(&self, name: &str) -> String {
        let program = match self.backend {
            IptablesBackend::Nft => "iptables-nft-save",
            IptablesBackend::Legacy => "iptables-legacy-save",
        };
        self.run(name, &format!("{program} -t mangle; {program} -t nat"))
    }

    /// Everything that a data path may touch on the host, for comparison.
    pub(crate) fn dump(&self) -> String {
        let text = self.run(
            "host",
            "ip -o link | cut -d: -f2; ip -o addr | cut -d\" \" -f2-6; ip rule; ip route show table all; \
             ipset list -n; for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo $f $(cat $f); done",
        );
        text + &self
            .save("host")
            .lines()
            .filter(|line| !line.starts_with('#'))
            // Whoever changes a table by iptables-legacy sets its policies' counters to zero.
            .map(|line| line.split(" [").next().unwrap_or_default())
            .collect::<Vec<_>>()
            .join("\n")
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        for name in &self.names {
            // The other namespaces still have to go when one cannot.
            let _ = Command::new("ip").args(["netns", "delete", name]).status();
        }
    }
}

/// Runs a shell script; what it printed.
pub(crate) fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{script}\n{printed}{} (these tests need root, iproute2, ipset and iptables)",
        String::from_utf8_lossy(&output.stderr)
    );
    printed
}

/// The node's input with this many pods and tunnels of this kind.
pub(crate) fn input_with(kind: TunnelKind, pods: usize) -> NodeInput {
    let mut input = input(pods);
    input.tunnel.kind = kind;
    set_mtu(
        &mut input,
        match kind {
            // Outer Ethernet, IPv4, UDP and geneve: what the kernel itself takes off.
            TunnelKind::Geneve => 1450,
            TunnelKind::Veth => 1500,
        },
    );
    input
}

/// Gives the tunnels another MTU.
pub(crate) fn set_mtu(input: &mut NodeInput, mtu: u32) {
    for slot in Slot::BOTH {
        if let Some(proxy) = &mut input.proxies[slot] {
            proxy.mtu = mtu;
        }
    }
}

/// The node's input with this many pods.
pub(crate) fn input(pods: usize) -> NodeInput {
    let end = |vni, ipv4: &str, ipv6: &str| {
        TunnelEnd::new(vni, ipv4.parse().unwrap(), ipv6.parse().unwrap()).unwrap()
    };
    NodeInput {
        names: Names::default(),
        tunnel: Tunnel {
            kind: TunnelKind::Veth,
            port: 6081,
            inbound: end(1000, "192.168.126.0/30", "fd61:6d62:6974:126::/126"),
            outbound: end(1001, "192.168.127.0/30", "fd61:6d62:6974:127::/126"),
        },
        ports: Ports {
            outbound: 15001,
            inbound: 15008,
            inbound_plaintext: 15006,
        },
        marks: Marks::default(),
        failure_mode: FailureMode::Closed,
        proxies: PerSlot {
            first: Some(Proxy {
                ends: Ends::V4(ipv4_pair(PROXY)),
                host_device: "vproxy".to_owned(),
                device: "eth0".to_owned(),
                mtu: 1500,
                default_rp_filter: "0".to_owned(),
            }),
            second: None,
        },
        serving: Some(Slot::First),
        pods: PODS[..pods]
            .iter()
            .map(|ip| MeshPod { ip: (*ip).into() })
            .collect(),
        pod_devices: BTreeSet::new(),
    }
}

/// The same node with IPv6 beside IPv4.
pub(crate) fn dual(mut input: NodeInput) -> NodeInput {
    for (slot, ip) in [(Slot::First, PROXY), (Slot::Second, NEXT_PROXY)] {
        if let Some(proxy) = &mut input.proxies[slot] {
            proxy.ends = both_ends(ip);
        }
    }
    let pods = input.pods.clone();
    input
        .pods
        .extend(pods.iter().filter_map(|pod| match pod.ip {
            IpAddr::V4(ip) => Some(MeshPod {
                ip: ipv6_of(ip).into(),
            }),
            IpAddr::V6(_) => None,
        }));
    input
}

/// The same node with IPv6 only.
pub(crate) fn ipv6_only(input: NodeInput) -> NodeInput {
    let mut input = dual(input);
    if let Some(proxy) = &mut input.proxies.first
        && let Ends::Dual(_, ipv6) = proxy.ends
    {
        proxy.ends = Ends::V6(ipv6);
    }
    input.pods.retain(|pod| pod.ip.is_ipv6());
    input
}

fn both_ends(proxy: Ipv4Addr) -> Ends {
    let ipv6 = Pair {
        proxy: ipv6_of(proxy),
        host: HOST6.parse().unwrap(),
    };
    Ends::Dual(ipv4_pair(proxy), ipv6)
}

fn ipv4_pair(proxy: Ipv4Addr) -> Pair<Ipv4Addr> {
    Pair {
        proxy,
        host: HOST.parse().unwrap(),
    }
}

/// The same node with another proxy pod, behind the host's device `vnext`.
pub(crate) fn replaced(mut input: NodeInput) -> NodeInput {
    if let Some(proxy) = &mut input.proxies.first {
        proxy.ends = match proxy.ends {
            Ends::V4(_) => Ends::V4(ipv4_pair(NEXT_PROXY)),
            Ends::V6(_) | Ends::Dual(..) => both_ends(NEXT_PROXY),
        };
        proxy.host_device = "vnext".to_owned();
    }
    input
}

/// The same node while that proxy pod takes over: the first keeps what it carries.
pub(crate) fn with_successor(mut input: NodeInput) -> NodeInput {
    input.proxies.second = replaced(input.clone()).proxies.first;
    input.serving = Some(Slot::Second);
    input
}

/// The same node after the first proxy's end.
pub(crate) fn succeeded(input: NodeInput) -> NodeInput {
    let mut input = with_successor(input);
    input.proxies.first = None;
    input
}
