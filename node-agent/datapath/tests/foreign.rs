//! On a host that others use, not a byte of theirs changes.
#![allow(clippy::unwrap_used, reason = "this is a test")]

mod bed;

use std::net::Ipv4Addr;

use bed::converge::{BACKENDS, attached, converge};
use bed::foreign::CILIUM_MARKS;
use bed::{Bed, input_with};
use datapath::facts::{self, Conflict};
use datapath::{Datapath, MeshPod, NodeInput, TunnelKind, build};

/// Enrolments, and as many withdrawals.
const ENROLMENTS: u8 = 100;

#[tokio::test]
async fn what_others_have_on_a_host_stays_byte_for_byte() {
    for backend in BACKENDS {
        let bed = Bed::new(backend);
        bed.occupy();
        // Counters of theirs are not zero.
        bed.run("a", "bash -c \"echo > /dev/udp/10.244.1.5/9\"");
        let before = theirs(&bed);
        assert!(before.lines().count() > 10_000, "{before}");

        let input = input_with(TunnelKind::Veth, 0);
        let kernel = attached(&bed, &input).await;
        assert_same(&before, &theirs(&bed), "installation");

        let with = |pods: u8| build(&with_pods(&input, pods));
        let mut now = with(0);
        for pods in (1..=ENROLMENTS).chain((0..ENROLMENTS).rev()) {
            let next = with(pods);
            converge(&kernel, &next, &now).await;
            if pods == ENROLMENTS {
                assert_same(&before, &theirs(&bed), "100 enrolments");
            }
            now = next;
        }
        assert_same(&before, &theirs(&bed), "100 withdrawals");

        converge(&kernel, &Datapath::default(), &now).await;
        assert_same(&before, &dump(&bed), "removal");
    }
}

/// The same node with this many pods, none of which the bed needs to have.
fn with_pods(input: &NodeInput, pods: u8) -> NodeInput {
    let mut input = input.clone();
    let pod = |number| MeshPod {
        ip: Ipv4Addr::new(10, 244, 1, 100 + number),
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
        .filter(|line| !line.starts_with('#') && !is_volatile(line))
        .map(|line| format!("{line}\n"))
        .collect()
}

/// What the kernel itself changes.
fn is_volatile(line: &str) -> bool {
    line.starts_with("netfilter/nf_conntrack_count")
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
    dump.lines()
        .filter(|line| !is_ours(line))
        .map(|line| format!("{line}\n"))
        .collect()
}

fn assert_same(before: &str, after: &str, when: &str) {
    if before == after {
        return;
    }
    let gone: Vec<&str> = before
        .lines()
        .filter(|line| !after.contains(line))
        .collect();
    let come: Vec<&str> = after
        .lines()
        .filter(|line| !before.contains(line))
        .collect();
    panic!("after {when}\ngone: {gone:#?}\ncome: {come:#?}\n(or another order)");
}

#[tokio::test]
async fn only_who_needs_our_marks_is_a_conflict() {
    for backend in BACKENDS {
        let bed = Bed::new(backend);
        bed.occupy();
        let host = bed.netns("host");
        let marks = input_with(TunnelKind::Veth, 0).marks;
        assert_eq!(facts::find(&host).await.unwrap().iptables, backend);
        let found = facts::conflicts(&host, backend, &marks).await.unwrap();
        assert_eq!(found, []);

        bed.restore(CILIUM_MARKS);
        bed.run(
            "host",
            "ip rule add priority 9 fwmark 0x200/0xf00 lookup 2004",
        );
        let found = facts::conflicts(&host, backend, &marks).await.unwrap();
        let is_rule = |conflict: &Conflict| matches!(conflict, Conflict::RuleMark(0x300));
        let is_chain = |conflict: &Conflict| matches!(conflict, Conflict::ChainMark { rule, .. } if rule.contains("CILIUM"));
        assert!(found.iter().any(is_rule), "{found:?}");
        assert_eq!(
            found.iter().filter(|conflict| is_chain(conflict)).count(),
            2,
            "{found:?}"
        );
    }
}
