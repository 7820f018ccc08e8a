//! The host's chains: marks, and no address translation of what the proxy must see whole.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::datapath::{Chain, Chains, Table};
use crate::family::Family;
use crate::input::{Marks, NodeInput};
use crate::names::Names;
use crate::slot::Slot;

pub(super) fn mangle(family: Family, input: &NodeInput) -> Chains {
    let proxied = input.marks.proxied;
    let save = Slot::BOTH.map(|slot| {
        let (mark, mask) = (proxied[slot], proxied[slot].mask());
        format!(
            "-m mark --mark {mark} -j CONNMARK --save-mark --nfmask {mask:#x} --ctmask {mask:#x}"
        )
    });
    // Only TCP: the host's own ICMP errors about such a connection go to its pod.
    let answer = Slot::BOTH.map(|slot| {
        let back = input.marks.return_[slot];
        format!(
            "-p tcp -m connmark --mark {} -j MARK --set-xmark {back}",
            proxied[slot]
        )
    });
    let mut prerouting = carried(input);
    prerouting.extend(of_proxies(family, input));
    prerouting.extend(of_pods(family, input));
    chains(
        &input.names,
        family,
        Table::Mangle,
        [
            ("PREROUTING", prerouting),
            ("FORWARD", save.to_vec()),
            ("INPUT", save.to_vec()),
            ("OUTPUT", answer.to_vec()),
        ],
    )
}

/// Packets of connections that a proxy carries go back to it, or nowhere when it is gone.
fn carried(input: &NodeInput) -> Vec<String> {
    let of_slot = |slot| {
        let from_elsewhere = input.proxies[slot]
            .as_ref()
            .map_or_else(String::new, |proxy| format!("! -i {} ", proxy.host_device));
        let answer = format!(
            "{from_elsewhere}-m connmark --mark {}",
            input.marks.proxied[slot]
        );
        let back = input.marks.return_[slot];
        [
            format!("{answer} -j MARK --set-xmark {back}"),
            format!("{answer} -j RETURN"),
        ]
    };
    Slot::BOTH.into_iter().flat_map(of_slot).collect()
}

/// What the proxies send: from pods' addresses, in their own name, and by the tunnels.
fn of_proxies(family: Family, input: &NodeInput) -> Vec<String> {
    let Marks {
        skip, proxied, own, ..
    } = &input.marks;
    let done = format!("-m mark --mark {skip} -j RETURN");
    let (mut dialled, mut own_traffic, mut answers) = (Vec::new(), Vec::new(), Vec::new());
    for (slot, proxy) in input.proxies.taken() {
        let (device, ends) = (&proxy.host_device, proxy.ends.of(family));
        let foreign_source = ends.map_or_else(String::new, |ends| {
            format!("! -s {} ", host_net(ends.proxy))
        });
        dialled.push(format!(
            "{foreign_source}-i {device} -j MARK --set-xmark {}",
            proxied[slot]
        ));
        own_traffic.push(format!("-i {device} -j MARK --set-xmark {own}"));
        let tunnels = input.names.devices(slot);
        answers.extend(tunnels.map(|device| format!("-i {device} -j MARK --set-xmark {skip}")));
    }
    if dialled.is_empty() {
        return Vec::new();
    }
    [
        dialled,
        vec![done.clone()],
        own_traffic,
        answers,
        vec![done],
    ]
    .concat()
}

/// What mesh pods send goes to the proxy, if it opens a connection.
fn of_pods(family: Family, input: &NodeInput) -> Vec<String> {
    let Marks { skip, outbound, .. } = &input.marks;
    vec![
        // Connections older than the enrolment of their pod keep their direct path; those that a proxy
        // carries have gone their way above.
        format!("-p tcp -m conntrack --ctstate ESTABLISHED -j MARK --set-xmark {skip}"),
        format!("-m mark --mark {skip} -j RETURN"),
        format!(
            "-p tcp -m set --match-set {} src -j MARK --set-xmark {outbound}",
            input.names.set(family)
        ),
    ]
}

pub(super) fn nat(family: Family, input: &NodeInput) -> Chains {
    // The proxy must see the ClusterIP and the pod's own address.
    let accept = format!("-m mark --mark {} -j ACCEPT", input.marks.outbound);
    chains(
        &input.names,
        family,
        Table::Nat,
        [
            ("PREROUTING", vec![accept.clone()]),
            ("POSTROUTING", vec![accept]),
        ],
    )
}

/// A host's address as iptables prints it in a match.
pub(super) fn host_net(ip: IpAddr) -> IpNet {
    ip.into()
}

pub(super) fn chains<const N: usize>(
    names: &Names,
    family: Family,
    table: Table,
    chains: [(&str, Vec<String>); N],
) -> Chains {
    let chains = chains
        .into_iter()
        .map(|(hook, rules)| {
            (
                hook.to_owned(),
                Chain {
                    jumps: vec![0],
                    rules,
                },
            )
        })
        .collect::<BTreeMap<_, _>>();
    Chains {
        family,
        table,
        prefix: names.chain_prefix().to_owned(),
        chains,
    }
}
