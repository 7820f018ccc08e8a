//! On a host that others use, not a byte of theirs changes.
#![allow(clippy::unwrap_used, reason = "this is a test")]

mod bed;

use std::collections::HashSet;
use std::net::Ipv4Addr;

use bed::converge::{BACKENDS, attached, converge};
use bed::{Bed, input_with};
use datapath::{Datapath, Kernel, MeshPod, NodeInput, TunnelKind, build, plan};

/// Enrolments, and as many withdrawals.
const ENROLMENTS: u8 = 100;

#[tokio::test]
async fn what_others_have_on_a_host_stays_byte_for_byte() {
    for backend in BACKENDS {
        let bed = Bed::new(backend);
        bed.occupy();
        // Counters of theirs are not zero.
        bed.run("a", "bash -c \"echo > /dev/udp/10.244.1.5/9\"");
        let (whole, before) = (dump(&bed), theirs(&bed));
        assert!(before.lines().count() > 10_000, "{before}");

        let input = input_with(TunnelKind::Veth, 0);
        let kernel = attached(&bed, &input).await;
        assert_same(&before, &theirs(&bed), "installation");

        let with = |pods: u8| build(&with_pods(&input, pods));
        let mut now = with(0);
        for pods in (1..=ENROLMENTS).chain((0..ENROLMENTS).rev()) {
            let next = with(pods);
            // As the agent does between its full passes.
            let observed = kernel.glance(&next).await.unwrap();
            kernel.apply(&plan(&next, &observed)).await.unwrap();
            if pods == ENROLMENTS {
                converge(&kernel, &next, &next).await;
                assert_same(&before, &theirs(&bed), "100 enrolments");
            }
            now = next;
        }
        assert_same(&before, &theirs(&bed), "100 withdrawals");

        converge(&kernel, &Datapath::default(), &now).await;
        assert_same(&whole, &dump(&bed), "removal");
    }
}

/// The same node with this many pods, none of which the bed needs to have.
fn with_pods(input: &NodeInput, pods: u8) -> NodeInput {
    let mut input = input.clone();
    let pod = |number| MeshPod {
        ip: Ipv4Addr::new(10, 244, 1, 100 + number).into(),
    };
    input.pods = (0..pods).map(pod).collect();
    input
}

/// Everything that a host's namespace holds, as other tools print it.
fn dump(bed: &Bed) -> String {
    let family = ["iptables", "ip6tables"]
        .map(|program| format!("{program}-nft-save -c 2>&1; {program}-legacy-save -c 2>&1; "));
    let text = bed.run(
        "host",
        &format!(
            "{} ip -d -o link; ip -o addr; ip rule; ip -6 rule; ip -d route show table all; ip -d -6 route show table all; \
             ipset save; cat /proc/net/ip_tables_names || true; cd /proc/sys/net; \
             find ipv4 ipv6 netfilter -type f -readable | sort | xargs grep -s . || true",
            family.concat()
        ),
    );
    text.lines()
        .filter(|line| !line.starts_with('#') && !line.starts_with(CONNECTIONS))
        .map(|line| line.strip_prefix(':').map_or(line, without_counters))
        .fold(String::new(), |text, line| text + line + "\n")
}

/// How many connections the kernel knows: old ones go by themselves.
const CONNECTIONS: &str = "netfilter/nf_conntrack_count";

/// A chain and its policy. Whoever changes a table by iptables-legacy sets its policies' counters to
/// zero; those of rules are kept.
fn without_counters(chain: &str) -> &str {
    chain.split(" [").next().unwrap_or(chain)
}

/// The dump less what carries our names, our route protocol, or is a setting of the proxy's device.
fn theirs(bed: &Bed) -> String {
    let names = ["ztunnel-", "istioin", "istioout"];
    let settings = ["ipv4/conf/vproxy/rp_filter:"];
    let is_ours = |line: &str| {
        names.iter().any(|name| line.contains(name))
            || line.contains(" proto 90")
            || settings.iter().any(|setting| line.starts_with(setting))
    };
    let dump = dump(bed);
    let theirs = dump.lines().filter(|line| !is_ours(line));
    theirs.fold(String::new(), |text, line| text + line + "\n")
}

fn assert_same(before: &str, after: &str, when: &str) {
    let only_in = |one: &str, other: &str| -> Vec<String> {
        let others: HashSet<&str> = other.lines().collect();
        let lines = one.lines().filter(|line| !others.contains(line));
        lines.map(str::to_owned).collect()
    };
    let (gone, come) = (only_in(before, after), only_in(after, before));
    assert!(
        before == after,
        "after {when}\ngone: {gone:#?}\ncome: {come:#?}\n(or another order)"
    );
}
