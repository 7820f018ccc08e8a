//! Any node: what may be wanted of its kernel, and what may be found in it.
#![allow(dead_code, reason = "whoever uses it uses a part of it")]

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use datapath::datapath::Item;
use datapath::kernel::recorded::take;
use datapath::names::{Names, peer};
use datapath::{Datapath, FailureMode, MeshPod, NodeInput, Place, TunnelKind, build, plan};
use proptest::prelude::*;

use crate::bed::{dual, input, set_mtu, succeeded, with_successor};

/// Last bytes of the addresses that mesh pods may have.
pub(crate) const PODS: std::ops::Range<u8> = 20..28;

/// Any node: with or without a proxy, of either kind of device, with other ports, marks and pods.
pub(crate) fn any_input() -> impl Strategy<Value = NodeInput> {
    let pods = prop::collection::btree_set(PODS, 0..5);
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    let settings = (0..2u16, 0..3u8);
    (pods, 0..5u8, flags, settings).prop_map(
        |(pods, proxy, (geneve, closed, both), (other, rp_filter))| {
            let mut input = input(0);
            input.pods = pods.iter().map(|last| pod(*last)).collect();
            input.pod_devices = pods.iter().map(|last| format!("v{last}")).collect();
            input.failure_mode = if closed {
                FailureMode::Closed
            } else {
                FailureMode::Open
            };
            if geneve {
                input.tunnel.kind = TunnelKind::Geneve;
            }
            input.ports.outbound += other;
            if other > 0 {
                input.marks.outbound = "0x800/0x800".parse().unwrap();
            }
            if let Some(proxy) = &mut input.proxies.first {
                proxy.default_rp_filter = rp_filter.to_string();
            }
            match proxy {
                0 => input.proxies.first = None,
                1 => input.serving = None,
                2 => {}
                3 => input = with_successor(input),
                _ => input = succeeded(input),
            }
            set_mtu(&mut input, 1500 - u32::from(other) * 100);
            if both { dual(input) } else { input }
        },
    )
}

/// What is wanted, of which somebody took parts away, with parts of what was wanted once; or what a
/// plan that was cut short has left.
pub(crate) fn any_observed() -> impl Strategy<Value = Datapath> {
    let parts = (any_input(), any_input(), any::<u64>(), any::<u64>())
        .prop_map(|(one, other, kept, left)| parts_of(&build(&one), kept, &build(&other), left));
    let cut_short = (any_input(), any_input(), any::<prop::sample::Index>())
        .prop_map(|(from, to, end)| cut_short(&build(&from), &build(&to), end));
    prop_oneof![parts, cut_short].prop_map(possible)
}

/// Without what the kernel does not hold: what is on a tunnel's device that is not there, and routes by
/// one that is down.
fn possible(mut held: Datapath) -> Datapath {
    let names = Names::default();
    for place in Place::ALL {
        let devices: BTreeSet<String> = match place {
            Place::Host => links(&held, place).collect(),
            Place::Proxy(slot) => {
                let peers = links(&held, Place::Host)
                    .filter(|device| names.slot_of(device) == Some(slot))
                    .map(|device| peer(&device));
                links(&held, place).chain(peers).collect()
            }
        };
        let side = held.side_mut(place);
        let is_up = |device: &str| side.contains(&Item::Up(device.to_owned()));
        let up: BTreeSet<String> = devices
            .iter()
            .filter(|device| is_up(device))
            .cloned()
            .collect();
        side.retain(|item| {
            let allowed = if matches!(item, Item::Route(_)) {
                &up
            } else {
                &devices
            };
            let device = item.device().filter(|device| names.is_device(device));
            device.is_none_or(|device| allowed.contains(device))
        });
    }
    held
}

fn links(held: &Datapath, place: Place) -> impl Iterator<Item = String> {
    held.side(place).iter().filter_map(|item| match item {
        Item::Link(link) => Some(link.name().to_owned()),
        _ => None,
    })
}

fn pod(last: u8) -> MeshPod {
    MeshPod {
        ip: Ipv4Addr::new(10, 244, 1, last).into(),
    }
}

fn parts_of(one: &Datapath, kept: u64, other: &Datapath, left: u64) -> Datapath {
    let mut seen = Datapath::default();
    for place in Place::ALL {
        let part = |datapath: &Datapath, bits: u64| -> Vec<Item> {
            let items = datapath.side(place).iter().enumerate();
            items
                .filter(|(index, _)| bits & (1 << (index % 64)) != 0)
                .map(|(_, item)| item.clone())
                .collect()
        };
        for item in part(one, kept).into_iter().chain(part(other, left)) {
            // The kernel holds one of each.
            if !seen.side(place).iter().any(|held| item.replaces(held)) {
                seen.side_mut(place).insert(item);
            }
        }
    }
    seen
}

fn cut_short(from: &Datapath, to: &Datapath, end: prop::sample::Index) -> Datapath {
    let mut state = from.clone();
    let steps = plan(to, from).steps;
    for step in steps.iter().take(end.index(steps.len() + 1)) {
        take(&mut state, step);
    }
    state
}
