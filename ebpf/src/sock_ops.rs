//! Socket callbacks: the moment at which a connecting socket has its source port but has sent nothing.
//!
//! Here a captured connection's original destination is filed under its source, where the agent finds it after `accept()`, and
//! a delivery of the agent's is noted, so that `sk_lookup` lets it through to the application. Connections between pods of the node
//! that stay in the kernel are attested here, too, and accounted for.

use aya_ebpf::bindings::{
    BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
    BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE,
};
use aya_ebpf::programs::SockOpsContext;
use culvert_ebpf_common::{Address, Endpoint, Flow, SocketKind};

use crate::maps::{CAPTURED, DELIVERIES};
use crate::{note, same_node};

const AF_INET: u32 = 2;

/// Acts on the callbacks that matter.
#[inline(always)]
pub(crate) fn observe(ctx: &SockOpsContext) {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(ctx),
        BPF_SOCK_OPS_STATE_CB => {
            if ctx.arg(1) == BPF_TCP_CLOSE {
                closed(ctx);
            }
        }
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => same_node::established(ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => same_node::accepted(ctx),
        _ => {}
    }
}

#[inline(always)]
fn connecting(ctx: &SockOpsContext) {
    let Some(socket) = note::of(ctx) else { return };
    let flow = flow(ctx);
    match socket.kind() {
        // A full map loses the oldest entry; a connection whose entry is lost is reset by the agent.
        SocketKind::Captured => drop(CAPTURED.insert(&flow.source, socket.original_dst(), 0)),
        SocketKind::Delivery => {
            if DELIVERIES.insert(&flow, 1, 0).is_ok() {
                let _there_until_evicted = ctx.set_cb_flags(BPF_SOCK_OPS_STATE_CB_FLAG as i32);
            }
        }
        SocketKind::SameNode => same_node::connecting(ctx, socket, &flow),
    }
}

#[inline(always)]
fn closed(ctx: &SockOpsContext) {
    match note::of(ctx).map(|socket| socket.kind()) {
        Some(SocketKind::SameNode) => same_node::source_closed(ctx),
        Some(SocketKind::Delivery) => {
            let _gone_already = DELIVERIES.remove(flow(ctx));
        }
        // The agents of other nodes on this kernel follow sockets of their own.
        Some(SocketKind::Captured) => {}
        None => same_node::destination_closed(ctx),
    }
}

/// Both ends of the socket, this end first.
#[inline(always)]
pub(crate) fn flow(ctx: &SockOpsContext) -> Flow {
    let remote_port = u32::from_be(ctx.remote_port()) as u16;
    // Both families' fields are read in any case: were the reads in branches, the compiler would merge them into one read through
    // a computed pointer into the context, which the verifier refuses.
    // SAFETY: the verifier checks each field access of the context; volatile keeps each where and as wide as it is.
    let (local_ip4, remote_ip4, local_ip6, remote_ip6) = unsafe {
        let words = |ip: *const [u32; 4]| {
            [
                core::ptr::read_volatile(&raw const (*ip)[0]),
                core::ptr::read_volatile(&raw const (*ip)[1]),
                core::ptr::read_volatile(&raw const (*ip)[2]),
                core::ptr::read_volatile(&raw const (*ip)[3]),
            ]
        };
        (
            core::ptr::read_volatile(&raw const (*ctx.ops).local_ip4),
            core::ptr::read_volatile(&raw const (*ctx.ops).remote_ip4),
            words(&raw const (*ctx.ops).local_ip6),
            words(&raw const (*ctx.ops).remote_ip6),
        )
    };
    let (local, remote) = if ctx.family() == AF_INET {
        (Address::from_v4_word(local_ip4), Address::from_v4_word(remote_ip4))
    } else {
        (Address::from_v6_words(local_ip6), Address::from_v6_words(remote_ip6))
    };
    Flow { source: Endpoint::new(local, ctx.local_port() as u16), destination: Endpoint::new(remote, remote_port) }
}
