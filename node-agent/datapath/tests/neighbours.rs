//! Two installations on one host, under names and numbers of their own: neither sees nor touches what
//! is the other's.
#![allow(clippy::unwrap_used, reason = "this is a test")]

mod bed;

use bed::converge::{BACKENDS, attached, converge, kernel_of};
use bed::{Bed, dual, input_with, replaced};
use datapath::input::TunnelEnd;
use datapath::names::Names;
use datapath::{Datapath, Kernel, NodeInput, Slot, TunnelKind, build, plan};

/// The neighbour: another proxy, other pods' addresses in other sets, other marks.
fn neighbour(kind: TunnelKind) -> NodeInput {
    let mut input = replaced(dual(input_with(kind, 1)));
    input.names = Names::default()
        .with_set("second-pods".to_owned())
        .and_then(|names| names.with_devices("secondin".to_owned(), "secondout".to_owned()))
        .and_then(|names| names.with_chain_prefix("second-".to_owned()))
        .and_then(|names| names.with_first_table(1100))
        .and_then(|names| names.with_first_priority(1100))
        .unwrap();
    let end = |vni, ipv4: &str, ipv6: &str| {
        TunnelEnd::new(vni, ipv4.parse().unwrap(), ipv6.parse().unwrap()).unwrap()
    };
    input.tunnel.inbound = end(2000, "192.168.226.0/30", "fd61:6d62:6974:226::/126");
    input.tunnel.outbound = end(2001, "192.168.227.0/30", "fd61:6d62:6974:227::/126");
    let mark = |text: &str| text.parse().unwrap();
    input.marks.outbound = mark("0x10000/0x10000");
    input.marks.skip = mark("0x20000/0x20000");
    input.marks.proxied.first = mark("0x120000/0x120000");
    input.marks.proxied.second = mark("0x220000/0x220000");
    input.marks.own = mark("0x60000/0x60000");
    input.marks.return_.first = mark("0x80000/0x80000");
    input.marks.return_.second = mark("0x400000/0x400000");
    input.marks.check().unwrap();
    input
}

#[tokio::test]
async fn two_installations_stand_side_by_side() {
    stand_side_by_side(TunnelKind::Veth).await;
}

#[tokio::test]
#[ignore = "needs a kernel with geneve: ring 5"]
async fn geneve_two_installations_stand_side_by_side() {
    stand_side_by_side(TunnelKind::Geneve).await;
}

async fn stand_side_by_side(kind: TunnelKind) {
    for backend in BACKENDS {
        let mut bed = Bed::dual(backend);
        bed.pod("next", bed::NEXT_PROXY);
        let first = dual(input_with(kind, 1));
        let kernel = attached(&bed, &first).await;
        let alone = bed.dump();

        let second = neighbour(kind);
        let mut other = kernel_of(&bed, second.names.clone());
        other.attach(Slot::First, bed.netns("next")).unwrap();
        let wanted = build(&second);
        converge(&other, &wanted, &wanted).await;
        for (tool, ours) in [
            (
                "ip rule",
                "1101:\tfrom all fwmark 0x10000/0x10000 lookup 1101",
            ),
            (
                "ip -6 route show table 1100",
                "via fd61:6d62:6974:226::2 dev secondin",
            ),
            ("ipset list -n", "second-pods6"),
        ] {
            let printed = bed.run("host", tool);
            assert!(printed.contains(ours), "{ours} is not in\n{printed}");
        }

        // Each finds its own as it should be.
        let observed = kernel.observe(&build(&first)).await.unwrap();
        let steps = plan(&build(&first), &observed);
        assert!(steps.is_empty(), "{steps}");

        converge(&other, &Datapath::default(), &wanted).await;
        assert_eq!(alone, bed.dump());
    }
}
