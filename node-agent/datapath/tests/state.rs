//! What `ip`, `ipset` and `iptables-save` print of a kernel that holds the data path, case by case,
//! as lists that a person can read: `tests/state/<kind>/<case>.txt`.
//!
//! With `AMBIT_GOLDEN=write` the lists are written instead of compared.
#![allow(clippy::unwrap_used, reason = "this is a test")]

mod bed;

use bed::converge::{BACKENDS, attached, converge};
use bed::{Bed, NEXT_PROXY, dual, input_with, replaced};
use datapath::{Kernel, TunnelKind, build};

/// The name and the text of a list, which goes with the program: the guest has no other files.
macro_rules! list {
    ($kind:literal, $case:literal) => {
        (
            concat!($kind, "/", $case, ".txt"),
            include_str!(concat!("state/", $kind, "/", $case, ".txt")),
        )
    };
}

/// A test of one case for both kinds of device.
macro_rules! case {
    ($run:ident, $veth:ident, $geneve:ident, $case:literal) => {
        #[tokio::test]
        async fn $veth() {
            $run(TunnelKind::Veth, list!("veth", $case)).await;
        }

        #[tokio::test]
        #[ignore = "needs a kernel with geneve: ring 5"]
        async fn $geneve() {
            $run(TunnelKind::Geneve, list!("geneve", $case)).await;
        }
    };
}

case!(no_pods, veth_no_pods, geneve_no_pods, "no_pods");
case!(one_pod, veth_one_pod, geneve_one_pod, "one_pod");
case!(two_pods, veth_two_pods, geneve_two_pods, "two_pods");
case!(pod_gone, veth_pod_gone, geneve_pod_gone, "pod_gone");
case!(
    proxy_replaced,
    veth_proxy_replaced,
    geneve_proxy_replaced,
    "proxy_replaced"
);
case!(dual_stack, veth_dual_stack, geneve_dual_stack, "dual_stack");

type List = (&'static str, &'static str);

async fn no_pods(kind: TunnelKind, list: List) {
    holds(kind, 0, list).await;
}

async fn one_pod(kind: TunnelKind, list: List) {
    holds(kind, 1, list).await;
}

async fn two_pods(kind: TunnelKind, list: List) {
    holds(kind, 2, list).await;
}

async fn holds(kind: TunnelKind, pods: usize, list: List) {
    for backend in BACKENDS {
        let bed = Bed::new(backend);
        attached(&bed, &input_with(kind, pods)).await;
        assert_list(&bed.state(&["host", "proxy"]), list);
    }
}

async fn pod_gone(kind: TunnelKind, list: List) {
    for backend in BACKENDS {
        let bed = Bed::new(backend);
        let two = input_with(kind, 2);
        let kernel = attached(&bed, &two).await;
        converge(&kernel, &build(&input_with(kind, 1)), &build(&two)).await;
        assert_list(&bed.state(&["host", "proxy"]), list);
    }
}

async fn proxy_replaced(kind: TunnelKind, list: List) {
    for backend in BACKENDS {
        let mut bed = Bed::new(backend);
        let before = input_with(kind, 1);
        let mut kernel = attached(&bed, &before).await;
        let after = replaced(before.clone());
        bed.pod("next", NEXT_PROXY);
        kernel.attach(bed.netns("next")).unwrap();
        let mut interest = build(&after);
        interest.host.extend(build(&before).host);
        converge(&kernel, &build(&after), &interest).await;
        assert_list(&bed.state(&["host", "next"]), list);
    }
}

async fn dual_stack(kind: TunnelKind, list: List) {
    for backend in BACKENDS {
        let bed = Bed::dual(backend);
        attached(&bed, &dual(input_with(kind, 2))).await;
        assert_list(&bed.state(&["host", "proxy"]), list);
    }
}

fn assert_list(state: &str, (name, wanted): List) {
    if std::env::var_os("AMBIT_GOLDEN").is_some_and(|what| what == "write") {
        let path = format!("{}/tests/state/{name}", env!("CARGO_MANIFEST_DIR"));
        std::fs::write(path, state).unwrap();
        return;
    }
    let missing: Vec<&str> = wanted
        .lines()
        .filter(|line| !state.lines().any(|held| held == *line))
        .collect();
    let extra: Vec<&str> = state
        .lines()
        .filter(|line| !wanted.lines().any(|want| want == *line))
        .collect();
    assert!(
        state == wanted,
        "the kernel does not hold tests/state/{name}\nmissing: {missing:#?}\nextra: {extra:#?}\nall of it:\n{state}"
    );
}
