//! What others may have put on a host before us: kube-proxy, a CNI, an administrator.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};

use datapath::IptablesBackend;

use super::Bed;

/// Services that kube-proxy's rules are about, with three endpoints each.
pub(crate) const SERVICES: usize = 1000;

impl Bed {
    /// A host that others use: thousands of rules of iptables, and rules, routes, sets and settings.
    pub(crate) fn occupy(&self) {
        self.run("host", OTHERS);
        self.restore(&kube_proxy());
        self.restore(CALICO);
        self.restore(CILIUM_CHAINED);
    }

    /// Puts text into the host's iptables, beside what is there.
    pub(crate) fn restore(&self, text: &str) {
        let program = match self.backend {
            IptablesBackend::Nft => "iptables-nft-restore",
            IptablesBackend::Legacy => "iptables-legacy-restore",
        };
        let netns = format!("--net=/run/netns/{}", self.name("host"));
        let mut child = Command::new("nsenter")
            .args([&netns, program, "--noflush"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        input.write_all(text.as_bytes()).unwrap();
        drop(input);
        assert!(child.wait().unwrap().success(), "{text}");
    }
}

/// Rules as kube-proxy writes them: a chain a Service, a chain an endpoint.
fn kube_proxy() -> String {
    let (mut chains, mut rules) = (String::new(), String::new());
    for service in 0..SERVICES {
        let (high, low) = (service / 250, service % 250);
        let (ip, svc) = (
            format!("10.96.{high}.{low}"),
            format!("KUBE-SVC-{service:016}"),
        );
        let about =
            |what: &str| format!("-m comment --comment \"shop/service-{service}:http{what}\"");
        // Writing to a String cannot fail.
        let _ = writeln!(chains, ":{svc} - [0:0]");
        let _ = writeln!(
            rules,
            "-A KUBE-SERVICES -d {ip}/32 -p tcp {} -m tcp --dport 80 -j {svc}\n\
             -A {svc} ! -s 10.244.0.0/16 -d {ip}/32 -p tcp {0} -m tcp --dport 80 -j KUBE-MARK-MASQ",
            about(" cluster IP")
        );
        for (endpoint, probability) in ["0.33333333349", "0.50000000000", ""].iter().enumerate() {
            let to = format!("10.245.{}.{}", high * 3 + endpoint, low);
            let sep = format!("KUBE-SEP-{service:012}{endpoint:04}");
            let chance = match *probability {
                "" => String::new(),
                chance => format!("-m statistic --mode random --probability {chance} "),
            };
            let _ = writeln!(chains, ":{sep} - [0:0]");
            let _ = writeln!(
                rules,
                "-A {svc} {} {chance}-j {sep}\n\
                 -A {sep} -s {to}/32 {} -j KUBE-MARK-MASQ\n\
                 -A {sep} -p tcp {1} -m tcp -j DNAT --to-destination {to}:8080",
                about(&format!(" -> {to}:8080")),
                about("")
            );
        }
    }
    let mut unready = String::new();
    for service in 0..100 {
        let _ = writeln!(
            unready,
            "-A KUBE-SERVICES -d 10.97.0.{service}/32 -p tcp -m comment --comment \
             \"shop/empty-{service} has no endpoints\" -m tcp --dport 80 \
             -j REJECT --reject-with icmp-port-unreachable"
        );
    }
    format!(
        "*mangle
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-PROXY-CANARY - [0:0]
COMMIT
*nat
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-SERVICES - [0:0]
{chains}-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully
{rules}-A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
COMMIT
*filter
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-SERVICES - [0:0]
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment \"block incoming localnet connections\" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack rule\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
{unready}COMMIT
"
    )
}

/// Rules, routes, sets and settings of others, some of them under numbers that are ours too.
const OTHERS: &str = r#"
    ip link add cni0 type veth peer name cni1
    ip addr add 10.250.0.1/24 dev cni0
    ip link set cni0 up
    ip rule add priority 101 from 198.51.100.0/24 lookup 500
    ip rule add priority 104 to 198.51.100.0/24 lookup 100 protocol static
    ip rule add priority 512 to 10.244.1.77 lookup main
    ip rule add priority 1024 fwmark 0x80000/0x80000 lookup 2004
    ip rule add priority 20000 from 203.0.113.9 lookup 501
    ip route add default via 10.250.0.2 dev cni0 table 500
    ip route add local 0.0.0.0/0 dev lo table 2004
    ip route add 198.51.100.0/24 via 10.250.0.3 dev cni0 table 100 proto static
    ip route add 198.51.100.0/25 via 10.250.0.4 dev cni0 table 101 proto bird
    ip route add blackhole 192.0.2.0/24
    ip route add 203.0.113.0/24 via 10.250.0.5 dev cni0 metric 77
    ipset create cali40all-ipam-pools hash:net family inet maxelem 1048576
    ipset create cali40masq-ipam-pools hash:net family inet maxelem 1048576
    ipset add cali40all-ipam-pools 10.244.0.0/16
    ipset add cali40masq-ipam-pools 10.244.0.0/16
    ipset create others-pods hash:ip family inet
    ipset add others-pods 10.244.1.4
    sysctl -qw net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.va.rp_filter=1 net.ipv4.conf.cni0.proxy_arp=1
    sysctl -qw net.ipv4.conf.vb.accept_local=1 net.ipv4.conf.cni0.route_localnet=1
"#;

/// As Felix programs a node: marks of its own half, a reverse path check, sets.
const CALICO: &str = "\
*raw
:cali-OUTPUT - [0:0]
:cali-PREROUTING - [0:0]
:cali-rpf-skip - [0:0]
-A PREROUTING -m comment --comment \"cali:6gwbT8clXdHdC1b1\" -j cali-PREROUTING
-A OUTPUT -m comment --comment \"cali:tVnHkvAo15HuiPy0\" -j cali-OUTPUT
-A cali-PREROUTING -m comment --comment \"cali:zatSDPVUhhPCk2Iy\" -j MARK --set-xmark 0x0/0xf0000
-A cali-PREROUTING -i cali+ -m comment --comment \"cali:-ES4EW5fxZG8tTNf\" -j MARK --set-xmark 0x40000/0x40000
-A cali-PREROUTING -m comment --comment \"cali:VX8l4jKL9w89GXz5\" -m mark --mark 0x40000/0x40000 -j cali-rpf-skip
-A cali-PREROUTING -m comment --comment \"cali:XT6fSG5EhTPUPFzW\" -m mark --mark 0x40000/0x40000 -m rpfilter --validmark --invert -j DROP
COMMIT
*mangle
:cali-POSTROUTING - [0:0]
:cali-PREROUTING - [0:0]
:cali-from-host-endpoint - [0:0]
-A PREROUTING -m comment --comment \"cali:6gwbT8clXdHdC1b1\" -j cali-PREROUTING
-A POSTROUTING -m comment --comment \"cali:O3lYWMrLQYEMJtB5\" -j cali-POSTROUTING
-A cali-PREROUTING -m comment --comment \"cali:6BJqBjBC7crtA-7-\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A cali-PREROUTING -m comment --comment \"cali:KX7AGNd6rMcDUai6\" -m mark --mark 0x10000/0x10000 -j ACCEPT
-A cali-PREROUTING -m comment --comment \"cali:wNH7KsA3ILKJBsY9\" -j cali-from-host-endpoint
-A cali-POSTROUTING -m comment --comment \"cali:NX-7roTexQ3fGRfU\" -m mark --mark 0x10000/0x10000 -j RETURN
COMMIT
*nat
:cali-POSTROUTING - [0:0]
:cali-PREROUTING - [0:0]
:cali-fip-dnat - [0:0]
:cali-nat-outgoing - [0:0]
-A PREROUTING -m comment --comment \"cali:6gwbT8clXdHdC1b1\" -j cali-PREROUTING
-A POSTROUTING -m comment --comment \"cali:O3lYWMrLQYEMJtB5\" -j cali-POSTROUTING
-A cali-PREROUTING -m comment --comment \"cali:r6XmIziWUJsdOK6Z\" -j cali-fip-dnat
-A cali-POSTROUTING -m comment --comment \"cali:nYKhEzDlr11Jccal\" -j cali-nat-outgoing
-A cali-nat-outgoing -m comment --comment \"cali:flqWnvo8yq4ULQLa\" -m set --match-set cali40masq-ipam-pools src -m set ! --match-set cali40all-ipam-pools dst -j MASQUERADE --random-fully
COMMIT
*filter
:cali-FORWARD - [0:0]
:cali-from-wl-dispatch - [0:0]
:cali-fw-cali0123456789a - [0:0]
-A FORWARD -m comment --comment \"cali:wUHhoiAYhphO9Mso\" -j cali-FORWARD
-A cali-FORWARD -m comment --comment \"cali:vjrMJCRpqwy5oRoX\" -j MARK --set-xmark 0x0/0xe0000
-A cali-FORWARD -i cali+ -m comment --comment \"cali:8ZoYfO5HKXWbB3pk\" -j cali-from-wl-dispatch
-A cali-from-wl-dispatch -i cali0123456789a -m comment --comment \"cali:zTj6P0TIgYvgz-md\" -g cali-fw-cali0123456789a
-A cali-from-wl-dispatch -m comment --comment \"cali:VNFFt9dmU8wfMTsR\" -j DROP
-A cali-fw-cali0123456789a -m comment --comment \"cali:HA8xmzOHLtJj9-7o\" -j MARK --set-xmark 0x0/0x30000
-A cali-fw-cali0123456789a -m comment --comment \"cali:oLzzje5WExbgfib5\" -m mark --mark 0x10000/0x10000 -j RETURN
COMMIT
";

/// Cilium beside another CNI, but for what needs marks of its own.
const CILIUM_CHAINED: &str = "\
*nat
:CILIUM_POST_nat - [0:0]
-A POSTROUTING -m comment --comment \"cilium-feeder: CILIUM_POST_nat\" -j CILIUM_POST_nat
-A CILIUM_POST_nat -s 10.250.0.0/24 ! -d 10.250.0.0/24 ! -o cilium_+ -m comment --comment \"cilium masquerade non-cluster\" -j MASQUERADE
COMMIT
*filter
:CILIUM_FORWARD - [0:0]
-A FORWARD -m comment --comment \"cilium-feeder: CILIUM_FORWARD\" -j CILIUM_FORWARD
-A CILIUM_FORWARD -o cilium_host -m comment --comment \"cilium: any->cluster on cilium_host forward accept\" -j ACCEPT
-A CILIUM_FORWARD -i lxc+ -m comment --comment \"cilium: cluster->any on lxc+ forward accept\" -j ACCEPT
COMMIT
";

/// Cilium's marks, whose mask covers ours.
pub(crate) const CILIUM_MARKS: &str = "\
*mangle
:CILIUM_PRE_mangle - [0:0]
-A PREROUTING -m comment --comment \"cilium-feeder: CILIUM_PRE_mangle\" -j CILIUM_PRE_mangle
-A CILIUM_PRE_mangle ! -o lo -m socket --transparent -m comment --comment \"cilium: any->pod redirect proxied traffic to host proxy\" -j MARK --set-xmark 0x200/0xffffffff
-A CILIUM_PRE_mangle -p tcp -m mark --mark 0x3920200 -m comment --comment \"cilium: TPROXY to host proxy\" -j TPROXY --on-port 14739 --on-ip 127.0.0.1 --tproxy-mark 0x200/0xffffffff
COMMIT
";
