//! Addresses, endpoints and flows as the kernel side keys them.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// An IPv6 address, or an IPv4 address mapped into IPv6 (RFC 4291, section 2.5.5.2). Four words in network byte order: the programs' compiler
/// would copy bytes one by one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Address([u32; 4]);

/// An address and a TCP port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Endpoint {
    address: Address,
    port: u16,
    padding: u16,
}

/// Both ends of a connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Flow {
    /// The end that dialled.
    pub source: Endpoint,
    /// The end that was dialled.
    pub destination: Endpoint,
}

const _: () = assert!(size_of::<Address>() == 16 && size_of::<Endpoint>() == 20 && size_of::<Flow>() == 40);

impl Address {
    /// No address: `::`.
    pub const UNSPECIFIED: Self = Self([0; 4]);

    /// The address of these four 32-bit words, each as it lies in memory in network byte order.
    #[inline(always)]
    #[must_use]
    pub const fn from_v6_words(words: [u32; 4]) -> Self {
        Self(words)
    }

    /// The IPv4 address of this 32-bit word, as it lies in memory in network byte order.
    #[inline(always)]
    #[must_use]
    pub const fn from_v4_word(word: u32) -> Self {
        Self::from_v6_words([0, 0, 0xffff_u32.to_be(), word])
    }

    /// The four 32-bit words, each in network byte order in memory.
    #[inline(always)]
    #[must_use]
    pub const fn words(self) -> [u32; 4] {
        self.0
    }

    /// The 16 bytes in network order.
    #[inline(always)]
    #[must_use]
    pub const fn octets(self) -> [u8; 16] {
        let [a, b, c, d] = self.0;
        let ([a0, a1, a2, a3], [b0, b1, b2, b3]) = (a.to_ne_bytes(), b.to_ne_bytes());
        let ([c0, c1, c2, c3], [d0, d1, d2, d3]) = (c.to_ne_bytes(), d.to_ne_bytes());
        [a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3]
    }

    /// Whether this is an IPv4 address, mapped.
    #[inline(always)]
    #[must_use]
    pub const fn is_v4(self) -> bool {
        let [a, b, c, _] = self.words();
        a == 0 && b == 0 && c == 0xffff_u32.to_be()
    }

    /// Whether this is `::`, `0.0.0.0` or a loopback address of either family.
    #[inline(always)]
    #[must_use]
    pub const fn is_local(self) -> bool {
        let [a, b, c, d] = self.words();
        if self.is_v4() {
            return d == 0 || d.to_ne_bytes()[0] == 127;
        }
        a == 0 && b == 0 && c == 0 && (d == 0 || d == 1_u32.to_be())
    }
}

impl From<IpAddr> for Address {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => ip.into(),
            IpAddr::V6(ip) => {
                let [a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3] = ip.octets();
                Self([[a0, a1, a2, a3], [b0, b1, b2, b3], [c0, c1, c2, c3], [d0, d1, d2, d3]].map(u32::from_ne_bytes))
            }
        }
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        Ipv6Addr::from(address.octets()).to_canonical()
    }
}

impl From<Ipv4Addr> for Address {
    fn from(ip: Ipv4Addr) -> Self {
        Self::from_v4_word(u32::from_ne_bytes(ip.octets()))
    }
}

impl Endpoint {
    /// `address` and `port` (host byte order).
    #[inline(always)]
    #[must_use]
    pub const fn new(address: Address, port: u16) -> Self {
        Self { address, port, padding: 0 }
    }

    /// The address.
    #[inline(always)]
    #[must_use]
    pub const fn address(self) -> Address {
        self.address
    }

    /// The port, in host byte order.
    #[inline(always)]
    #[must_use]
    pub const fn port(self) -> u16 {
        self.port
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(addr: SocketAddr) -> Self {
        Self::new(addr.ip().into(), addr.port())
    }
}

impl From<Endpoint> for SocketAddr {
    fn from(endpoint: Endpoint) -> Self {
        Self::new(endpoint.address.into(), endpoint.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_octets_agree() {
        let ip: IpAddr = "2001:db8::7".parse().expect("an address");
        let address = Address::from(ip);
        assert_eq!(Address::from_v6_words(address.words()), address);
        assert_eq!(IpAddr::from(address), ip);
    }

    #[test]
    fn an_ipv4_word_becomes_the_mapped_address() {
        let address = Address::from_v4_word(u32::from_ne_bytes([10, 1, 2, 3]));
        assert_eq!(IpAddr::from(address), "10.1.2.3".parse::<IpAddr>().expect("an address"));
        assert!(address.is_v4());
    }

    #[test]
    fn only_loopback_and_unspecified_addresses_are_local() {
        for (text, local) in [
            ("127.0.0.1", true),
            ("127.9.9.9", true),
            ("0.0.0.0", true),
            ("::1", true),
            ("::", true),
            ("10.0.0.1", false),
            ("::2", false),
            ("fd00::1", false),
        ] {
            assert_eq!(Address::from(text.parse::<IpAddr>().expect("an address")).is_local(), local, "{text}");
        }
    }
}
