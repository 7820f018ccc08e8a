//! Where packets end: in every state that may be wanted, and at every step on the way to it. The way
//! is worked out by `model`, which knows what the kernel does with what a data path is made of.
#![allow(clippy::unwrap_used, clippy::panic, reason = "this is a test")]

mod any;
mod bed;
mod model;

use std::net::IpAddr;

use any::{any_input, any_observed};
use datapath::kernel::recorded::take;
use datapath::plan::{Change, Step};
use datapath::{Datapath, Family, Item, NodeInput, Place, Slot, build, plan};
use model::danger::{Danger, by_kind, dangers_of_pod};
use model::node::{self, Node};
use model::settled::{Settled, is_guarded, members};
use proptest::prelude::*;

/// Whether the kernel takes a pod for one of the mesh.
fn is_member(held: &Datapath, ip: IpAddr) -> bool {
    held.host
        .iter()
        .any(|item| matches!(item, Item::Member(member) if member.ip == ip))
}

/// Takes the steps from what is observed to what is wanted. A pod that is in the mesh before and after is
/// never exposed to what it was not exposed to before the first step, and to nothing at the end.
fn stays_safe(to: &NodeInput, observed: &Datapath) -> Result<(), TestCaseError> {
    let dangers: Vec<Vec<Danger>> = Family::ALL
        .into_iter()
        .flat_map(|family| members(to, family).map(move |last| (last, family)))
        .filter(|(last, family)| is_guarded(to) && is_member(observed, node::pod(*last, *family)))
        .take(2)
        .flat_map(|(last, family)| {
            let mut dangers = dangers_of_pod(last, family, to);
            dangers.sort_by_key(|danger| danger.what);
            by_kind(dangers)
        })
        .collect();
    let exposed = |state: &Datapath| -> Vec<Option<String>> {
        let node = Node::of_any_source(state);
        dangers
            .iter()
            .map(|kind| kind.iter().find_map(|danger| danger.strikes(&node)))
            .collect()
    };
    let plan = plan(&build(to), observed);
    let mut state = observed.clone();
    let mut before = exposed(&state);
    for (index, step) in plan.steps.iter().enumerate() {
        take(&mut state, step);
        let after = exposed(&state);
        for (_, new) in before
            .iter()
            .zip(&after)
            .filter(|(before, _)| before.is_none())
        {
            prop_assert!(
                new.is_none(),
                "after step {index}, {step}\n{}\nthe plan\n{plan}\nfrom\n{}",
                new.as_deref().unwrap_or_default(),
                shown(observed)
            );
        }
        before = after;
    }
    for left in before.into_iter().flatten() {
        prop_assert!(false, "in the end {left}");
    }
    Ok(())
}

/// The state without one of its items or, of chains, without one of their rules or jumps.
fn without_one(
    whole: &Datapath,
    item: prop::sample::Index,
    part: prop::sample::Index,
) -> Option<Datapath> {
    let all: Vec<(Place, Item)> = Place::ALL
        .into_iter()
        .flat_map(|place| {
            whole
                .side(place)
                .iter()
                .map(move |item| (place, item.clone()))
        })
        .collect();
    if all.is_empty() {
        return None;
    }
    let (place, old) = item.get(&all).clone();
    let change = match old.clone() {
        Item::Chains(mut chains) => {
            let hooks: Vec<String> = chains.chains.keys().cloned().collect();
            let chain = chains.chains.get_mut(part.get(&hooks))?;
            match part.index(chain.rules.len() + 1) {
                0 => chain.jumps.clear(),
                rule => drop(chain.rules.remove(rule - 1)),
            }
            Change::Replace {
                old,
                new: Item::Chains(chains),
            }
        }
        _ => Change::Remove(old),
    };
    let mut broken = whole.clone();
    if let Change::Remove(Item::Set(set)) = &change {
        let in_it = |item: &Item| matches!(item, Item::Member(member) if member.set == *set);
        broken.host.retain(|item| !in_it(item));
    }
    take(&mut broken, &Step { place, change });
    Some(broken)
}

fn shown(state: &Datapath) -> String {
    plan(state, &Datapath::default()).to_string()
}

proptest! {
    #[test]
    fn in_every_state_that_may_be_wanted_every_packet_ends_where_it_should(input in any_input()) {
        let node = Settled::of(&input);
        for family in input.families() {
            for last in node.pods(family) {
                for case in node.sent_by_pod(last, family).iter().chain(&node.sent_to_pod(last, family)) {
                    node.holds(case)?;
                }
                for slot in Slot::BOTH {
                    if input.proxies[slot].is_none() {
                        node.refuses(slot, last, family)?;
                    }
                }
                if let Some(slot) = node.serving(family) {
                    node.is_carried(slot, last, family)?;
                }
            }
            let proxies: Vec<Slot> = node.proxies(family).map(|(slot, _)| slot).collect();
            for slot in proxies {
                for case in node.of_proxy(slot, family) {
                    node.holds(&case)?;
                }
                for last in node.pods(family) {
                    node.dials(slot, last, family)?;
                }
            }
        }
    }

    /// Whatever single item somebody deletes, or rule out of a chain, or jump to one.
    #[test]
    fn one_missing_piece_lets_no_packet_out_in_the_clear_or_back(
        input in any_input(), item in any::<prop::sample::Index>(), part in any::<prop::sample::Index>(),
    ) {
        let whole = build(&input);
        let Some(broken) = without_one(&whole, item, part) else { return Ok(()) };
        let node = Node::of_any_source(&broken);
        for family in Family::ALL {
            for last in members(&input, family).filter(|_| is_guarded(&input)) {
                for danger in dangers_of_pod(last, family, &input) {
                    let struck = danger.strikes(&node);
                    prop_assert!(
                        struck.is_none(),
                        "{}\nmissing: {}",
                        struck.unwrap_or_default(),
                        plan(&whole, &broken)
                    );
                }
            }
        }
    }

    #[test]
    fn no_step_from_one_wanted_state_to_another_lets_a_packet_out_in_the_clear_or_back(
        from in any_input(), to in any_input(),
    ) {
        stays_safe(&to, &build(&from))?;
    }

    /// Between two states that have a proxy, a pod that joins or leaves can be reached, and reach others, at
    /// every step: directly or by the proxy.
    #[test]
    fn no_step_refuses_a_connection_of_a_pod_that_joins_or_leaves(
        input in any_input(), joining in any::<bool>(), others in any::<u64>(),
    ) {
        let mut fewer = input.clone();
        fewer.pods.retain(|pod| node::pod_of(pod.ip).is_some_and(|last| others & (1 << (last % 64)) != 0));
        let (from, to) = if joining { (&fewer, &input) } else { (&input, &fewer) };
        let mut state = build(from);
        let plan = plan(&build(to), &state);
        for (index, step) in plan.steps.iter().enumerate() {
            take(&mut state, step);
            let node = Node::of_any_source(&state);
            for family in input.families() {
                if input.serving().is_none_or(|(_, proxy)| proxy.ends.of(family).is_none()) {
                    continue;
                }
                for last in members(&input, family).filter(|last| !members(&fewer, family).any(|one| one == *last)) {
                    for refused in model::danger::refusals_of_pod(last, family) {
                        let struck = refused.strikes(&node);
                        prop_assert!(
                            struck.is_none(),
                            "after step {index}, {step}\n{}\nthe plan\n{plan}",
                            struck.unwrap_or_default()
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn no_step_from_whatever_is_found_lets_a_packet_out_in_the_clear_or_back(
        to in any_input(), observed in any_observed(),
    ) {
        stays_safe(&to, &observed)?;
    }
}
