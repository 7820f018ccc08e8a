//! What fuzz targets call: whatever reads what the kernel says over netlink.

use std::collections::BTreeMap;
use std::hint::black_box;

use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};

use super::message::{foreign_mark, on_link, own_route, own_rule, way};
use crate::datapath::Place;
use crate::kernel::{netfilter, xtables};
use crate::names::Names;

/// Reads a message about devices, addresses, routes or rules.
pub fn route(bytes: &[u8]) {
    let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes) else {
        return;
    };
    let NetlinkPayload::InnerMessage(message) = message.payload else {
        return;
    };
    let names = Names::default();
    match message {
        RouteNetlinkMessage::NewRoute(route) => {
            let devices = BTreeMap::from([(1, "istioin".to_owned())]);
            for place in Place::ALL {
                drop(own_route(&route, place, &devices, &names));
            }
            black_box((way(&route), on_link(&route)));
        }
        RouteNetlinkMessage::NewRule(rule) => {
            for place in Place::ALL {
                drop(own_rule(&rule, place, &names));
            }
            black_box(foreign_mark(&rule));
        }
        _ => {}
    }
}

/// Reads answers about sets and generations.
pub fn netfilter(bytes: &[u8]) {
    let mut members = Vec::new();
    let done = netfilter::answers(bytes, 1, &mut |answer| {
        members.extend(netfilter::members(answer));
    });
    drop(done);
}

/// Reads the rules of a legacy table.
pub fn legacy_table(bytes: &[u8]) {
    for family in crate::family::Family::ALL {
        drop(xtables::hash_of(bytes, family));
    }
}
