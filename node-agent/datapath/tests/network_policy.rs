//! What the host's chains forbid stays forbidden: on the way to the proxy, on the way from it, and
//! where no proxy is.
#![allow(clippy::unwrap_used, reason = "this is a test")]

mod bed;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::time::Duration;

use bed::converge::attached;
use bed::{Bed, PODS, dual, input_with, ipv6_of};
use datapath::{Family, IptablesBackend, TunnelKind};

/// Time for a connection that is to be.
const LONG: Duration = Duration::from_secs(5);
/// Time for one that is not to be: far more than namespaces of one machine need.
const SHORT: Duration = Duration::from_millis(250);

/// A third pod; like the second, it is not in the mesh.
const THIRD: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 6);

/// A connection: the namespace that opens it, the pod it says it is, and the pod it is for.
#[derive(Clone, Copy, Debug)]
struct Dial {
    from: &'static str,
    source: Ipv4Addr,
    to: Ipv4Addr,
}

const MESH: Ipv4Addr = PODS[0];
const OTHER: Ipv4Addr = PODS[1];

/// A mesh pod dials: its packets go to the proxy.
const TO_THE_PROXY: Dial = Dial {
    from: "a",
    source: MESH,
    to: OTHER,
};
/// The proxy dials on, as the pod.
const FROM_THE_PROXY: Dial = Dial {
    from: "proxy",
    ..TO_THE_PROXY
};
/// Somebody dials a mesh pod: the packets go to its proxy.
const INBOUND_TO_THE_PROXY: Dial = Dial {
    from: "b",
    source: OTHER,
    to: MESH,
};
/// The proxy dials its pod, as whoever dialled.
const INBOUND_FROM_THE_PROXY: Dial = Dial {
    from: "proxy",
    ..INBOUND_TO_THE_PROXY
};
/// No pod of the mesh.
const DIRECT: Dial = Dial {
    from: "b",
    source: OTHER,
    to: THIRD,
};

const ALL: [Dial; 5] = [
    TO_THE_PROXY,
    FROM_THE_PROXY,
    INBOUND_TO_THE_PROXY,
    INBOUND_FROM_THE_PROXY,
    DIRECT,
];

#[tokio::test]
async fn nft_a_drop_in_forward_still_drops() {
    still_drops(IptablesBackend::Nft).await;
}

#[tokio::test]
async fn legacy_a_drop_in_forward_still_drops() {
    still_drops(IptablesBackend::Legacy).await;
}

async fn still_drops(backend: IptablesBackend) {
    let policies = Policies::start(backend, TunnelKind::Veth).await;
    for (family, dial) in dials() {
        let (source, to) = (ip(family, dial.source), ip(family, dial.to));
        policies.pass(family, dial);
        // The request, the answer, all that a pod sends, all that it gets.
        for rule in [
            format!("-s {source} -d {to} -p tcp -j DROP"),
            format!("-s {to} -d {source} -p tcp -j DROP"),
            format!("-s {source} -j DROP"),
            format!("-d {to} -p tcp -m tcp --dport 80 -j DROP"),
        ] {
            policies.iptables(family, &format!("-I FORWARD {rule}"));
            policies.fail(family, dial, &rule);
            policies.iptables(family, &format!("-D FORWARD {rule}"));
        }
        policies.pass(family, dial);
    }
}

#[tokio::test]
async fn nft_a_network_policys_chain_lets_through_whom_it_names_and_nobody_else() {
    names_whom_it_lets_through(IptablesBackend::Nft).await;
}

#[tokio::test]
async fn legacy_a_network_policys_chain_lets_through_whom_it_names_and_nobody_else() {
    names_whom_it_lets_through(IptablesBackend::Legacy).await;
}

async fn names_whom_it_lets_through(backend: IptablesBackend) {
    let policies = Policies::start(backend, TunnelKind::Veth).await;
    for (family, dial) in dials() {
        let to = ip(family, dial.to);
        policies.protect(family, to, ip(family, dial.source));
        policies.pass(family, dial);
        policies.unprotect(family, to);
        policies.protect(family, to, ip(family, STRANGER));
        policies.fail(family, dial, "a chain that names somebody else");
        policies.unprotect(family, to);
    }
}

fn dials() -> impl Iterator<Item = (Family, Dial)> {
    Family::ALL
        .into_iter()
        .flat_map(|family| ALL.map(|dial| (family, dial)))
}

fn ip(family: Family, ip: Ipv4Addr) -> IpAddr {
    match family {
        Family::V4 => ip.into(),
        Family::V6 => ipv6_of(ip).into(),
    }
}

/// Whom the tests' policies allow and who is nowhere.
const STRANGER: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 99);

/// A bed with a data path, its listeners, and the host's iptables.
struct Policies {
    bed: Bed,
    _listeners: Vec<TcpListener>,
}

impl Policies {
    async fn start(backend: IptablesBackend, kind: TunnelKind) -> Self {
        let mut bed = Bed::dual(backend);
        bed.pod("c", THIRD);
        attached(&bed, &dual(input_with(kind, 1))).await;
        let mut listeners = vec![
            bed.listen("a", 80),
            bed.listen("b", 80),
            bed.listen("c", 80),
        ];
        // One socket takes both families.
        let listen = |port| bed.listen_transparently("proxy", Family::V6, port);
        listeners.extend([15001, 15006].map(listen));
        Self {
            bed,
            _listeners: listeners,
        }
    }

    fn connects(&self, family: Family, dial: Dial, patience: Duration) -> bool {
        let source = ip(family, dial.source);
        let to = SocketAddr::new(ip(family, dial.to), 80);
        self.bed
            .dial(dial.from, SocketAddr::new(source, 0), to, patience)
            .is_ok()
    }

    fn pass(&self, family: Family, dial: Dial) {
        let backend = self.bed.backend;
        assert!(
            self.connects(family, dial, LONG),
            "{backend:?} {dial:?} over {family:?}"
        );
    }

    fn fail(&self, family: Family, dial: Dial, why: &str) {
        let backend = self.bed.backend;
        assert!(
            !self.connects(family, dial, SHORT),
            "{backend:?} {dial:?} over {family:?} passed {why}"
        );
    }

    fn iptables(&self, family: Family, arguments: &str) {
        let family = match family {
            Family::V4 => "iptables",
            Family::V6 => "ip6tables",
        };
        let backend = match self.bed.backend {
            IptablesBackend::Nft => "nft",
            IptablesBackend::Legacy => "legacy",
        };
        self.bed
            .run("host", &format!("{family}-{backend} {arguments}"));
    }

    /// Policies as a controller of them writes them: a chain for a pod, which marks what is allowed
    /// and refuses the rest.
    fn protect(&self, family: Family, pod: IpAddr, allowed: IpAddr) {
        for arguments in [
            "-N KUBE-POD-FW".to_owned(),
            "-A KUBE-POD-FW -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT".to_owned(),
            format!(
                "-A KUBE-POD-FW -s {allowed} -p tcp -m tcp --dport 80 -j MARK --set-xmark 0x10000/0x10000"
            ),
            "-A KUBE-POD-FW -m mark ! --mark 0x10000/0x10000 -j REJECT".to_owned(),
            "-A KUBE-POD-FW -j MARK --set-xmark 0x0/0x10000".to_owned(),
            format!("-I FORWARD -d {pod} -j KUBE-POD-FW"),
        ] {
            self.iptables(family, &arguments);
        }
    }

    fn unprotect(&self, family: Family, pod: IpAddr) {
        for arguments in [
            format!("-D FORWARD -d {pod} -j KUBE-POD-FW"),
            "-F KUBE-POD-FW".to_owned(),
            "-X KUBE-POD-FW".to_owned(),
        ] {
            self.iptables(family, &arguments);
        }
    }
}
