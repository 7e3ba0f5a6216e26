//! The values that policies hold: from text to typed.
//!
//! Enter: one text of a field. Leaves: its meaning, or none if it has none. Whose field it is, and what a failure means, is the caller's.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::model::{IpBlock, ServiceAccountMatch, StringMatch};

/// A port from 1 to 65535, in plain decimal.
pub(super) fn port(text: &str) -> Option<u16> {
    let port: u16 = text.parse().ok()?;
    (port != 0 && port.to_string() == text).then_some(port)
}

/// An address or a range in CIDR form. What is written in the IPv4-mapped form means IPv4, as addresses of connections do.
pub(super) fn ip_block(text: &str) -> Option<IpBlock> {
    let net = match text.contains('/') {
        true => text.parse().ok()?,
        false => IpNet::from(text.parse::<IpAddr>().ok()?),
    };
    let (address, length) = (net.addr(), net.prefix_len());
    Some(match address.to_canonical() {
        IpAddr::V4(canonical) if address.is_ipv6() && length >= 96 => IpBlock { address: canonical.into(), length: length - 96 },
        IpAddr::V4(_) | IpAddr::V6(_) => IpBlock { address, length },
    })
}

/// `*`, `text*`, `*text` or `text`. None for an empty text.
pub(super) fn string_match(text: &str) -> Option<StringMatch> {
    Some(match (text.strip_prefix('*'), text.strip_suffix('*')) {
        _ if text.is_empty() => return None,
        (Some(""), _) => StringMatch::Presence,
        (Some(rest), _) => StringMatch::Suffix(rest.into()),
        (None, Some(rest)) => StringMatch::Prefix(rest.into()),
        (None, None) => StringMatch::Exact(text.into()),
    })
}

/// Whether a `*` stands where it is compared as it is, rather than as a wildcard. No name or identity holds one.
pub(super) fn has_literal_star(matcher: &StringMatch) -> bool {
    match matcher {
        StringMatch::Exact(text) | StringMatch::Prefix(text) | StringMatch::Suffix(text) => text.contains('*'),
        StringMatch::Presence => false,
    }
}

/// `name`, in the namespace `home`, or `namespace/name`.
pub(super) fn service_account(text: &str, home: &str) -> Option<ServiceAccountMatch> {
    let (namespace, name) = text.split_once('/').unwrap_or((home, text));
    let legal = |part: &str| !part.is_empty() && !part.contains(['/', '*']) && !part.contains(char::is_whitespace);
    let part = |text: &str| -> Arc<str> { text.into() };
    (legal(namespace) && legal(name)).then(|| ServiceAccountMatch { namespace: part(namespace), service_account: part(name) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_plain_decimals_from_1_to_65535() {
        assert_eq!((port("1"), port("65535")), (Some(1), Some(65535)));
        for bad in ["", "0", "65536", "-1", "+80", "080", " 80", "80-90", "http", "0x50"] {
            assert_eq!(port(bad), None, "{bad}");
        }
    }

    #[test]
    fn ip_blocks_are_addresses_or_ranges_of_either_family() {
        let block = |text: &str, length| IpBlock { address: text.parse().unwrap(), length };
        assert_eq!(ip_block("10.1.2.3"), Some(block("10.1.2.3", 32)));
        assert_eq!(ip_block("10.1.0.0/16"), Some(block("10.1.0.0", 16)));
        assert_eq!(ip_block("0.0.0.0/0"), Some(block("0.0.0.0", 0)));
        assert_eq!(ip_block("fd00::1"), Some(block("fd00::1", 128)));
        assert_eq!(ip_block("fd00::/8"), Some(block("fd00::", 8)));
        for bad in ["", "*", "10.1.2", "10.1.2.3/33", "10.1.2.3/", "fd00::/129", "10.0.0.0/-1", "10.1.2.*", "host", "10.0.0.1:80"]
        {
            assert_eq!(ip_block(bad), None, "{bad}");
        }
    }

    #[test]
    fn an_ipv4_mapped_block_means_the_ipv4_block() {
        assert_eq!(ip_block("::ffff:10.1.2.3"), Some(IpBlock { address: "10.1.2.3".parse().unwrap(), length: 32 }));
        assert_eq!(ip_block("::ffff:10.1.0.0/112"), Some(IpBlock { address: "10.1.0.0".parse().unwrap(), length: 16 }));
        assert_eq!(ip_block("::ffff:0.0.0.0/95").map(|block| block.address.is_ipv6()), Some(true));
    }

    #[test]
    fn a_star_at_one_end_is_a_wildcard() {
        assert_eq!(string_match(""), None);
        assert_eq!(string_match("*"), Some(StringMatch::Presence));
        assert_eq!(string_match("shop"), Some(StringMatch::Exact("shop".into())));
        assert_eq!(string_match("shop*"), Some(StringMatch::Prefix("shop".into())));
        assert_eq!(string_match("*shop"), Some(StringMatch::Suffix("shop".into())));
        assert_eq!(string_match("*shop*"), Some(StringMatch::Suffix("shop*".into())));
        for (text, literal) in [("*", false), ("a*", false), ("*a", false), ("*a*", true), ("a*b", true), ("**", true)] {
            assert_eq!(has_literal_star(&string_match(text).unwrap()), literal, "{text}");
        }
    }

    #[test]
    fn a_service_account_without_namespace_is_of_the_policys_own() {
        let of =
            |namespace: &str, name: &str| Some(ServiceAccountMatch { namespace: namespace.into(), service_account: name.into() });
        assert_eq!(service_account("cart", "shop"), of("shop", "cart"));
        assert_eq!(service_account("pay/cart", "shop"), of("pay", "cart"));
        for bad in ["", "/", "pay/", "/cart", "a/b/c", "*", "pay/*", "a b"] {
            assert_eq!(service_account(bad, "shop"), None, "{bad}");
        }
    }
}
