//! What `ip`, `ipset` and `iptables-save` print of a kernel that holds the data path, case by case,
//! as lists that a person can read: `tests/state/<kind>/<case>.txt`.
//!
//! With `AMBIT_GOLDEN=write` the lists are written instead of compared.
#![allow(clippy::unwrap_used, reason = "this is a test")]

mod bed;

use bed::converge::{BACKENDS, attached, converge};
use bed::{Bed, NEXT_PROXY, dual, input_with, succeeded, with_successor};
use datapath::{Kernel, Slot, TunnelKind, build};

/// The name and the text of a list, which goes with the program: the guest has no other files.
macro_rules! list {
    ($kind:literal, $case:literal) => {
        (
            concat!($kind, "/", $case, ".txt"),
            include_str!(concat!("state/", $kind, "/", $case, ".txt")),
        )
    };
}

#[tokio::test]
async fn state_without_pods() {
    no_pods(TunnelKind::Veth, list!("veth", "no_pods")).await;
}

#[tokio::test]
#[ignore = "needs a kernel with geneve: ring 5"]
async fn geneve_state_without_pods() {
    no_pods(TunnelKind::Geneve, list!("geneve", "no_pods")).await;
}

#[tokio::test]
async fn state_with_one_pod() {
    one_pod(TunnelKind::Veth, list!("veth", "one_pod")).await;
}

#[tokio::test]
#[ignore = "needs a kernel with geneve: ring 5"]
async fn geneve_state_with_one_pod() {
    one_pod(TunnelKind::Geneve, list!("geneve", "one_pod")).await;
}

#[tokio::test]
async fn state_with_two_pods() {
    two_pods(TunnelKind::Veth, list!("veth", "two_pods")).await;
}

#[tokio::test]
#[ignore = "needs a kernel with geneve: ring 5"]
async fn geneve_state_with_two_pods() {
    two_pods(TunnelKind::Geneve, list!("geneve", "two_pods")).await;
}

#[tokio::test]
async fn state_after_a_pod_has_gone() {
    pod_gone(TunnelKind::Veth, list!("veth", "pod_gone")).await;
}

#[tokio::test]
#[ignore = "needs a kernel with geneve: ring 5"]
async fn geneve_state_after_a_pod_has_gone() {
    pod_gone(TunnelKind::Geneve, list!("geneve", "pod_gone")).await;
}

#[tokio::test]
async fn state_with_another_proxy() {
    proxy_replaced(
        TunnelKind::Veth,
        list!("veth", "two_proxies"),
        list!("veth", "proxy_replaced"),
    )
    .await;
}

#[tokio::test]
#[ignore = "needs a kernel with geneve: ring 5"]
async fn geneve_state_with_another_proxy() {
    proxy_replaced(
        TunnelKind::Geneve,
        list!("geneve", "two_proxies"),
        list!("geneve", "proxy_replaced"),
    )
    .await;
}

#[tokio::test]
async fn state_with_both_families() {
    dual_stack(TunnelKind::Veth, list!("veth", "dual_stack")).await;
}

#[tokio::test]
#[ignore = "needs a kernel with geneve: ring 5"]
async fn geneve_state_with_both_families() {
    dual_stack(TunnelKind::Geneve, list!("geneve", "dual_stack")).await;
}

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

async fn proxy_replaced(kind: TunnelKind, both_list: List, list: List) {
    for backend in BACKENDS {
        let mut bed = Bed::new(backend);
        let before = input_with(kind, 1);
        let mut kernel = attached(&bed, &before).await;
        let (both, after) = (with_successor(before.clone()), succeeded(before.clone()));
        bed.pod("next", NEXT_PROXY);
        kernel.attach(Slot::Second, bed.netns("next")).unwrap();
        converge(&kernel, &build(&both), &build(&both)).await;
        assert_list(&bed.state(&["host", "proxy", "next"]), both_list);
        kernel.detach(Slot::First);
        converge(&kernel, &build(&after), &build(&both)).await;
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
