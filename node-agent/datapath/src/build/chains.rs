//! The host's chains: marks, and no address translation of what the proxy must see whole.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::datapath::{Chain, Chains, Table};
use crate::family::Family;
use crate::input::{Marks, NodeInput};
use crate::names::Names;
use crate::set::Role;
use crate::slot::Slot;

/// `--syn` as iptables-save prints it: what opens a connection.
const SYN: &str = "--tcp-flags FIN,SYN,RST,ACK SYN";

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
    let mut prerouting = vec![opened_anew(input)];
    prerouting.extend(carried(input));
    prerouting.extend(of_proxies(family, input));
    prerouting.extend(of_pods(family, input));
    let forward = [save.to_vec(), guard(family, input)].concat();
    chains(
        &input.names,
        family,
        Table::Mangle,
        [
            ("PREROUTING", prerouting),
            ("FORWARD", forward),
            ("INPUT", save.to_vec()),
            ("OUTPUT", answer.to_vec()),
        ],
    )
}

/// After a reset by the answering side, conntrack takes a new connection between the same ports for the old
/// one: whoever carried that knows nothing of this.
fn opened_anew(input: &NodeInput) -> String {
    let Marks { proxied, .. } = &input.marks;
    let bits = proxied.first.mask() | proxied.second.mask();
    format!(
        "-p tcp -m tcp {SYN} -m conntrack --ctstatus ASSURED -j CONNMARK --set-xmark 0x0/{bits:#x}"
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
        // Connections older than the enrolment of their pod keep their direct path, also while they are
        // being opened; those that a proxy carries have gone their way above.
        format!(
            "-p tcp -m tcp ! {SYN} -m conntrack --ctstate ESTABLISHED -j MARK --set-xmark {skip}"
        ),
        format!(
            "-p tcp -m conntrack --ctstate ESTABLISHED ! --ctstatus ASSURED -j MARK --set-xmark {skip}"
        ),
        format!("-m mark --mark {skip} -j RETURN"),
        format!(
            "-p tcp -m set --match-set {} src -j MARK --set-xmark {outbound}",
            input.names.set(Role::Redirect, family).name
        ),
    ]
}

/// What a proxy sends and would come back to one is dropped, as is what should have gone to a proxy and
/// goes elsewhere: whatever single rule, route, chain, set or member of ours somebody deletes, nothing goes
/// round and nothing leaves in the clear until it is mended.
fn guard(family: Family, input: &NodeInput) -> Vec<String> {
    let set = input.names.set(Role::Guard, family).name;
    let proxies = || input.proxies.taken();
    let tunnels = || proxies().flat_map(|(slot, _)| input.names.devices(slot));
    let mut rules = Vec::new();
    for (_, proxy) in proxies() {
        let device = &proxy.host_device;
        rules.extend(tunnels().map(|tunnel| format!("-i {device} -o {tunnel} -j DROP")));
    }
    rules.push(format!("-m mark --mark {} -j RETURN", input.marks.skip));
    let devices = proxies().map(|(_, proxy)| proxy.host_device.clone());
    rules.extend(
        devices
            .chain(tunnels())
            .map(|device| format!("-o {device} -j RETURN")),
    );
    rules
        .extend(["src", "dst"].map(|end| format!("-p tcp -m set --match-set {set} {end} -j DROP")));
    rules
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
