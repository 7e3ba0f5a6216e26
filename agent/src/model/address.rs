//! Addresses, one type for each role, so that no two of them can be confused.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

macro_rules! role {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

role! {
    /// The address that an application dialled, before redirection. Never IPv4-mapped.
    OriginalDst(SocketAddr)
}
role! {
    /// The far end of a tunnel: a pod's address and the peer agent's HBONE port. Never IPv4-mapped.
    PeerAddr(SocketAddr)
}
role! {
    /// An address of a pod. Never IPv4-mapped.
    PodIp(IpAddr)
}

/// Turns an IPv4-mapped IPv6 address into the IPv4 address it stands for (RFC 4291, section 2.5.5.2).
#[must_use]
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}
