//! What is typed into a kernel, case by case, as text that a person can read: `tests/golden/*.snap`.
#![allow(clippy::unwrap_used, reason = "this is a test")]

mod bed;

use bed::{dual, input, replaced, set_mtu, succeeded, with_successor};
use datapath::datapath::{Datapath, Item, Link};
use datapath::names::Names;
use datapath::{FailureMode, Hold, NodeInput, TunnelKind, build, plan, with_holds};

fn shown(name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("golden");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(name, text));
}

fn from_nothing(input: &NodeInput) -> String {
    plan(&build(input), &Datapath::default()).to_string()
}

fn between(from: &NodeInput, to: &NodeInput) -> String {
    plan(&build(to), &build(from)).to_string()
}

#[test]
fn golden_no_proxy_yet() {
    let mut input = input(0);
    input.proxies.first = None;
    shown("no_proxy_yet", &from_nothing(&input));
}

#[test]
fn golden_no_pods() {
    shown("no_pods", &from_nothing(&input(0)));
}

#[test]
fn golden_no_pods_geneve() {
    let mut input = input(0);
    input.tunnel.kind = TunnelKind::Geneve;
    set_mtu(&mut input, 1450);
    shown("no_pods_geneve", &from_nothing(&input));
}

#[test]
fn golden_one_pod() {
    shown("one_pod", &between(&input(0), &input(1)));
}

#[test]
fn golden_two_pods() {
    shown("two_pods", &between(&input(0), &input(2)));
}

#[test]
fn golden_held_pod_is_enrolled() {
    let hold = |ip: &str| Hold {
        device: "va".to_owned(),
        ip: ip.parse().unwrap(),
    };
    let holds = [hold("10.244.1.4"), hold("fd00:244:1::4")].into();
    let (without, with) = (build(&dual(input(0))), build(&dual(input(1))));
    let held = with_holds(without.clone(), &holds, &Names::default());
    let (comes, enrolled) = (plan(&held, &without), plan(&with, &held));
    shown(
        "held_pod_is_enrolled",
        &format!("as the plugin holds it:\n{comes}it is enrolled:\n{enrolled}"),
    );
}

#[test]
fn golden_pod_gone() {
    shown("pod_gone", &between(&input(2), &input(1)));
}

#[test]
fn golden_proxy_gone_closed() {
    let mut gone = input(1);
    gone.proxies.first = None;
    shown("proxy_gone_closed", &between(&input(1), &gone));
}

#[test]
fn golden_proxy_gone_open() {
    let mut gone = input(1);
    gone.proxies.first = None;
    gone.failure_mode = FailureMode::Open;
    shown("proxy_gone_open", &between(&input(1), &gone));
}

#[test]
fn golden_proxy_restarts_in_its_pod() {
    let mut restarting = input(1);
    restarting.serving = None;
    let (stops, starts) = (
        between(&input(1), &restarting),
        between(&restarting, &input(1)),
    );
    shown(
        "proxy_restarts_in_its_pod",
        &format!("stops:\n{stops}starts:\n{starts}"),
    );
}

#[test]
fn golden_proxy_replaced() {
    let both = with_successor(input(1));
    let (comes, goes) = (
        between(&input(1), &both),
        between(&both, &succeeded(input(1))),
    );
    shown(
        "proxy_replaced",
        &format!("the next one comes:\n{comes}the old one goes:\n{goes}"),
    );
}

/// Its namespace was gone before another came.
#[test]
fn golden_proxy_lost_and_replaced() {
    let new = replaced(input(1));
    shown(
        "proxy_lost_and_replaced",
        &plan(&build(&new), &seen_from_new_proxy(&input(1))).to_string(),
    );
}

/// What is there once another proxy's namespace is attached: that one is empty, and the pairs lead
/// elsewhere.
fn seen_from_new_proxy(old: &NodeInput) -> Datapath {
    let mut seen = build(old);
    seen.proxies.first.clear();
    seen.host = seen
        .host
        .into_iter()
        .map(|item| match item {
            Item::Link(Link::Veth { name, mtu, .. }) => Item::Link(Link::Veth {
                name,
                peer: None,
                mtu,
            }),
            other => other,
        })
        .collect();
    seen
}

#[test]
fn golden_dual_stack() {
    shown("dual_stack", &from_nothing(&dual(input(1))));
}

#[test]
fn golden_ipv4_becomes_dual_stack() {
    shown(
        "ipv4_becomes_dual_stack",
        &between(&input(1), &dual(input(1))),
    );
}

#[test]
fn golden_geneve_to_veth() {
    let (mut geneve, veth) = (input(0), input(0));
    geneve.tunnel.kind = TunnelKind::Geneve;
    shown("geneve_to_veth", &between(&geneve, &veth));
}

#[test]
fn golden_removal() {
    shown(
        "removal",
        &plan(&Datapath::default(), &build(&input(1))).to_string(),
    );
}
