//! `getpeername()`: a captured socket's peer is the address that the application dialled, not the agent.

use aya_ebpf::programs::SockAddrContext;
use culvert_ebpf_common::{Endpoint, SocketKind};

use crate::note;

/// A socket of IPv4 asks.
#[inline(always)]
pub(crate) fn over_ipv4(ctx: &SockAddrContext) {
    let Some(original_dst) = original_dst(ctx) else { return };
    let [_, _, _, word] = original_dst.address().words();
    // SAFETY: the verifier checks each field access of the context.
    unsafe {
        (*ctx.sock_addr).user_ip4 = word;
        (*ctx.sock_addr).user_port = u32::from(original_dst.port().to_be());
    }
}

/// A socket of IPv6 asks.
#[inline(always)]
pub(crate) fn over_ipv6(ctx: &SockAddrContext) {
    let Some(original_dst) = original_dst(ctx) else { return };
    let [a, b, c, d] = original_dst.address().words();
    // SAFETY: the verifier checks each field access of the context; volatile keeps them 4 bytes wide, as it asks.
    unsafe {
        let ip = &raw mut (*ctx.sock_addr).user_ip6;
        core::ptr::write_volatile(&raw mut (*ip)[0], a);
        core::ptr::write_volatile(&raw mut (*ip)[1], b);
        core::ptr::write_volatile(&raw mut (*ip)[2], c);
        core::ptr::write_volatile(&raw mut (*ip)[3], d);
        (*ctx.sock_addr).user_port = u32::from(original_dst.port().to_be());
    }
}

#[inline(always)]
fn original_dst(ctx: &SockAddrContext) -> Option<Endpoint> {
    let socket = note::of_peer(ctx)?;
    match socket.kind() {
        SocketKind::Captured => Some(socket.original_dst()),
        SocketKind::Delivery | SocketKind::SameNode => None,
    }
}
