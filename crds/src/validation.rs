//! What the API server refuses, and the words it says: rules in CEL, for `x-kubernetes-validations`.
//!
//! What CEL cannot say (a mark's value lies within its mask) the agent checks and reports.

use serde_json::{Value, json};

/// Of the pair of tunnels.
pub(crate) fn tunnels() -> Value {
    rules(&[
        (
            "self.inbound.vni != self.outbound.vni",
            "the tunnels' vni must differ: inbound and outbound have the same",
        ),
        // A text that is no CIDR is refused by its own rule.
        (
            "!isCIDR(self.inbound.cidr) || !isCIDR(self.outbound.cidr) || \
             !(cidr(self.inbound.cidr).containsCIDR(self.outbound.cidr) || \
             cidr(self.outbound.cidr).containsCIDR(self.inbound.cidr))",
            "the tunnels' cidr must not overlap: give inbound and outbound networks of their own",
        ),
        (
            "has(self.inbound.ipv6Cidr) == has(self.outbound.ipv6Cidr)",
            "set the ipv6Cidr of both tunnels, or of none",
        ),
        (
            "!has(self.inbound.ipv6Cidr) || !has(self.outbound.ipv6Cidr) || \
             !isCIDR(self.inbound.ipv6Cidr) || !isCIDR(self.outbound.ipv6Cidr) || \
             !(cidr(self.inbound.ipv6Cidr).containsCIDR(self.outbound.ipv6Cidr) || \
             cidr(self.outbound.ipv6Cidr).containsCIDR(self.inbound.ipv6Cidr))",
            "the tunnels' ipv6Cidr must not overlap: give inbound and outbound networks of their own",
        ),
    ])
}

/// Of a tunnel's inner network of IPv4.
pub(crate) fn network() -> Value {
    rules(&[
        (
            "isCIDR(self) && cidr(self).ip().family() == 4",
            "must be an IPv4 network, for example 192.168.126.0/30",
        ),
        (
            "!isCIDR(self) || cidr(self).prefixLength() >= 16 && cidr(self).prefixLength() <= 30",
            "must be a network of /16 to /30: it has to hold two addresses, and should hide no others",
        ),
        IS_MASKED,
    ])
}

/// Of a tunnel's inner network of IPv6.
pub(crate) fn ipv6_network() -> Value {
    rules(&[
        (
            "isCIDR(self) && cidr(self).ip().family() == 6",
            "must be an IPv6 network, for example fd61:6d62:6974:126::/126",
        ),
        (
            "!isCIDR(self) || cidr(self).prefixLength() >= 48 && cidr(self).prefixLength() <= 126",
            "must be a network of /48 to /126: it has to hold two addresses, and should hide no others",
        ),
        IS_MASKED,
    ])
}

const IS_MASKED: (&str, &str) = (
    "!isCIDR(self) || cidr(self) == cidr(self).masked()",
    "must be the address of a network: the bits after the prefix must be zero",
);

/// Of the listeners' ports.
pub(crate) fn ports() -> Value {
    rules(&[
        (
            "self.outbound != self.inbound && self.outbound != self.inboundPlaintext && \
             self.inbound != self.inboundPlaintext",
            "the ports must differ from each other",
        ),
        (
            "[self.outbound, self.inbound, self.inboundPlaintext].all(port, \
             !(port in [15000, 15012, 15014, 15020, 15021, 15022]))",
            "ports 15000, 15012, 15014, 15020, 15021 and 15022 are reserved for Ambit's own admin, \
             metrics and discovery",
        ),
    ])
}

/// Of a packet mark.
pub(crate) fn mark() -> Value {
    rules(&[
        (
            "self.matches('^0x[0-9a-fA-F]{1,8}/0x[0-9a-fA-F]{1,8}$')",
            "must be value/mask in hexadecimal, for example 0x100/0x100",
        ),
        (
            "!self.matches('^0x0+(/.*)?$')",
            "the value must have at least one bit",
        ),
    ])
}

fn rules(rules: &[(&str, &str)]) -> Value {
    rules
        .iter()
        .map(|(rule, message)| json!({"rule": rule, "message": message}))
        .collect()
}
