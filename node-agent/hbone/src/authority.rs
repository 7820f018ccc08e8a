//! The authority of a CONNECT: `10.0.0.1:80`, and `[fd00::1]:80` for IPv6. Pure.

use std::net::SocketAddr;

/// Writes it.
pub(crate) fn format(to: SocketAddr) -> String {
    // Without the zone of a link-local address, which means nothing to somebody else.
    SocketAddr::new(to.ip(), to.port()).to_string()
}

/// Reads it. An IPv4-mapped address is none: each pod has one way to be named in each family.
pub(crate) fn parse(text: &str) -> Option<SocketAddr> {
    let to: SocketAddr = text.parse().ok()?;
    let has_zone = matches!(to, SocketAddr::V6(v6) if v6.scope_id() != 0);
    let is_mapped = to.ip() != to.ip().to_canonical();
    (!has_zone && !is_mapped && to.port() != 0).then_some(to)
}

#[cfg(test)]
mod tests {
    use http::Uri;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn addresses_of_both_families_are_read() {
        for text in ["10.0.0.1:80", "[fd00::1]:80", "[::1]:65535"] {
            let read = parse(text).unwrap();
            assert_eq!(format(read), text);
        }
    }

    #[test]
    fn what_is_no_address_and_port_is_refused() {
        for text in [
            "",
            "web.shop:80",
            "10.0.0.1",
            "10.0.0.1:0",
            "10.0.0.1:70000",
            "10.0.0.256:80",
            "010.0.0.1:80",
            "fd00::1:80",
            "[fd00::1]",
            "[fd00::1]:",
            "[10.0.0.1]:80",
            "[fe80::1%2]:80",
            "[::ffff:10.0.0.1]:80",
            "user@10.0.0.1:80",
            " 10.0.0.1:80",
        ] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn what_one_proxy_writes_the_other_reads(ip: std::net::IpAddr, port in 1u16..) {
            let to = SocketAddr::new(ip.to_canonical(), port);
            let uri = Uri::builder().authority(format(to)).build().unwrap();
            let received = uri.authority().unwrap().as_str();
            prop_assert_eq!(parse(received), Some(to));
        }

        #[test]
        fn whatever_is_read_is_written_and_read_alike(text in "[\\[\\]0-9a-f:.%]{0,24}") {
            if let Some(to) = parse(&text) {
                prop_assert_eq!(parse(&format(to)), Some(to));
                prop_assert_eq!(to.ip(), to.ip().to_canonical());
            }
        }
    }
}
