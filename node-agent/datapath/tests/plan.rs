//! For whatever is wanted and whatever is there, the plan leads to what is wanted, and on its way no
//! pod's traffic leaves in the clear.
#![allow(clippy::unwrap_used, reason = "this is a test")]

mod bed;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use bed::{dual, input, set_mtu, succeeded, with_successor};
use datapath::datapath::{Member, Route, Rule, Table};
use datapath::kernel::recorded::{RecordedKernel, take};
use datapath::names::Names;
use datapath::netns::Netns;
use datapath::{
    Datapath, FailureMode, Family, Item, Kernel, MeshPod, NodeInput, PerSlot, Place, Slot,
    TunnelKind, build, plan,
};
use proptest::prelude::*;

/// Any node: with or without a proxy, of either kind of device, with other ports, marks and pods.
fn any_input() -> impl Strategy<Value = NodeInput> {
    let pods = prop::collection::btree_set(4u8..12, 0..5);
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    (pods, 0..5u8, flags, 0..2u16).prop_map(|(pods, proxy, (geneve, closed, both), other)| {
        let mut input = input(0);
        input.pods = pods.into_iter().map(pod).collect();
        input.failure_mode = if closed {
            FailureMode::Closed
        } else {
            FailureMode::Open
        };
        if geneve {
            input.tunnel.kind = TunnelKind::Geneve;
        }
        set_mtu(&mut input, 1500 - u32::from(other) * 100);
        input.ports.outbound += other;
        if other > 0 {
            input.marks.outbound = "0x800/0x800".parse().unwrap();
        }
        match proxy {
            0 => input.proxies.first = None,
            1 => input.serving = None,
            2 => {}
            3 => input = with_successor(input),
            _ => input = succeeded(input),
        }
        if both { dual(input) } else { input }
    })
}

fn pod(last: u8) -> MeshPod {
    MeshPod {
        ip: Ipv4Addr::new(10, 244, 1, last).into(),
    }
}

/// What is wanted, of which somebody took parts away, with parts of what was wanted once.
fn any_observed() -> impl Strategy<Value = Datapath> {
    (any_input(), any_input(), any::<u64>(), any::<u64>()).prop_map(|(one, other, kept, left)| {
        let mut seen = Datapath::default();
        for place in Place::ALL {
            let part = |datapath: &Datapath, bits: u64| -> Vec<Item> {
                let items = datapath.side(place).iter().enumerate();
                items
                    .filter(|(index, _)| bits & (1 << (index % 64)) != 0)
                    .map(|(_, item)| item.clone())
                    .collect()
            };
            for item in part(&build(&one), kept)
                .into_iter()
                .chain(part(&build(&other), left))
            {
                // The kernel holds one of each.
                if !seen.side(place).iter().any(|held| item.replaces(held)) {
                    seen.side_mut(place).insert(item);
                }
            }
        }
        seen
    })
}

fn holding(observed: &Datapath) -> RecordedKernel {
    let mut kernel = RecordedKernel::holding(observed.clone());
    for slot in Slot::BOTH {
        kernel.attach(slot, Netns::own()).unwrap();
    }
    kernel
}

/// Everything, so that settings of either are seen.
fn both(one: &Datapath, other: &Datapath) -> Datapath {
    Datapath {
        host: one.host.union(&other.host).cloned().collect(),
        proxies: PerSlot {
            first: one
                .proxies
                .first
                .union(&other.proxies.first)
                .cloned()
                .collect(),
            second: one
                .proxies
                .second
                .union(&other.proxies.second)
                .cloned()
                .collect(),
        },
    }
}

fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap()
        .block_on(work)
}

/// Why a member's traffic would go out in the clear, if it would.
fn leak(host: &BTreeSet<Item>, pod: IpAddr) -> Option<&'static str> {
    let names = Names::default();
    let member = Member {
        set: names.set(Family::of(pod)),
        ip: pod,
    };
    if !host.contains(&Item::Member(member)) {
        return Some("it is no member of the set");
    }
    let family = Family::of(pod);
    let is_marked = host.iter().any(|item| {
        matches!(item, Item::Chains(chains)
            if chains.table == Table::Mangle && chains.family == family)
    });
    if !is_marked {
        return Some("no chain marks it");
    }
    let is_sent = host.iter().any(|item| {
        matches!(
            item,
            Item::Rule(Rule {
                family: of,
                priority,
                ..
            }) if *of == family && *priority == names.priority_outbound()
        )
    });
    if !is_sent {
        return Some("no rule sends it to table 101");
    }
    let ends = host.iter().any(|item| {
        matches!(item, Item::Route(Route { table, destination, .. })
            if *table == names.table_outbound() && *destination == family.everywhere())
    });
    (!ends).then_some("table 101 has no default route, so that it falls through to the main table")
}

proptest! {
    #[test]
    fn the_plan_reaches_what_is_wanted_from_anywhere(wanted in any_input(), observed in any_observed()) {
        let desired = build(&wanted);
        let kernel = holding(&observed);
        let interest = both(&desired, &observed);
        let seen = run(kernel.observe(&interest)).unwrap();
        run(kernel.apply(&plan(&desired, &seen))).unwrap();
        let seen = run(kernel.observe(&interest)).unwrap();
        let again = plan(&desired, &seen);
        prop_assert!(again.is_empty(), "there is still to do\n{again}");
        for place in Place::ALL {
            let missing: Vec<&Item> = desired.side(place).difference(seen.side(place)).collect();
            prop_assert!(missing.is_empty(), "{place:?} lacks {missing:?}");
        }
    }

    #[test]
    fn a_step_that_fails_leaves_a_state_from_which_the_next_plan_goes_on(
        wanted in any_input(), observed in any_observed(), failing in 0usize..40,
    ) {
        let desired = build(&wanted);
        let kernel = holding(&observed);
        let mut left = failing;
        kernel.fail_when(move |_| {
            left = left.wrapping_sub(1);
            (left == usize::MAX).then_some(datapath::kernel::KernelError::Detached)
        });
        let interest = both(&desired, &observed);
        for _ in 0..2 {
            let seen = run(kernel.observe(&interest)).unwrap();
            let _ = run(kernel.apply(&plan(&desired, &seen)));
        }
        let seen = run(kernel.observe(&interest)).unwrap();
        prop_assert!(plan(&desired, &seen).is_empty());
    }

    /// From one good state to the next, at every step: a pod that is in the mesh before and after is
    /// in it all the time, and nothing of it falls through.
    #[test]
    fn no_step_of_a_plan_lets_traffic_out_in_the_clear(from in any_input(), to in any_input()) {
        let (mut from, mut to) = (from, to);
        // Other marks are other rules: their change is not atomic, but fails closed by the set.
        to.marks = from.marks;
        (from.failure_mode, to.failure_mode) = (FailureMode::Closed, FailureMode::Closed);
        let stays: Vec<IpAddr> = from.pods.iter().filter(|pod| to.pods.contains(pod)).map(|pod| pod.ip).collect();
        let (observed, desired) = (build(&from), build(&to));
        let mut state = observed.clone();
        for step in plan(&desired, &observed).steps {
            take(&mut state, &step);
            for pod in &stays {
                prop_assert_eq!(leak(&state.host, *pod), None, "after {}", step);
            }
        }
    }

    /// The proxy's own dials must be told apart before anything is routed to it, or they come back.
    #[test]
    fn routes_to_the_proxy_come_after_the_chains_and_the_devices(to in any_input()) {
        let mut state = Datapath::default();
        let slot = to.serving.unwrap_or(Slot::First);
        for step in plan(&build(&to), &Datapath::default()).steps {
            let Some(Item::Route(route)) = step.change.ends().1.cloned() else {
                take(&mut state, &step);
                continue;
            };
            if step.place == Place::Host && route.leads_into_a_tunnel() {
                let chains = |side: &BTreeSet<Item>| side.iter().any(|item| matches!(item, Item::Chains(chains) if chains.table == Table::Mangle));
                prop_assert!(chains(&state.host) && chains(&state.proxies[slot]), "{step} comes too early");
                prop_assert!(state.host.iter().any(|item| matches!(item, Item::Link(_))));
            }
            take(&mut state, &step);
        }
    }
}
