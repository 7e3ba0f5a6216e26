//! What is noted of a socket when it connects, in the socket itself: it goes with the socket, and finding it takes no table.

use aya_ebpf::bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock};
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::{bpf_sk_storage_delete, bpf_sk_storage_get};
use aya_ebpf::programs::{SockAddrContext, SockOpsContext};
use culvert_ebpf_common::Socket;

use crate::maps::SOCKETS;

/// Notes this of the socket that connects; false when there is no room.
#[inline(always)]
pub(crate) fn set(ctx: &SockAddrContext, socket: Socket) -> bool {
    let place = find(socket_of(ctx), BPF_SK_STORAGE_GET_F_CREATE.into());
    if place.is_null() {
        return false;
    }
    // SAFETY: the place is the socket's own, as large as what is written, and there is until the program ends.
    unsafe { *place = socket };
    true
}

/// Drops what is noted of the socket.
#[inline(always)]
pub(crate) fn unset(ctx: &SockAddrContext) {
    // SAFETY: map and socket are what the helper takes; the verifier checks both.
    let _nothing_noted = unsafe { bpf_sk_storage_delete(map(), socket_of(ctx).cast()) };
}

/// What is noted of the socket whose peer is asked for.
#[inline(always)]
pub(crate) fn of_peer(ctx: &SockAddrContext) -> Option<&Socket> {
    noted(find(socket_of(ctx), 0))
}

/// What is noted of the socket of a callback.
#[inline(always)]
pub(crate) fn of(ctx: &SockOpsContext) -> Option<&Socket> {
    // SAFETY: the verifier checks each field access of the context; volatile keeps it where and as wide as it is.
    let socket = unsafe { core::ptr::read_volatile(&raw const (*ctx.ops).__bindgen_anon_2.sk) };
    if socket.is_null() {
        return None;
    }
    noted(find(socket, 0))
}

#[inline(always)]
fn socket_of(ctx: &SockAddrContext) -> *mut bpf_sock {
    // SAFETY: the verifier checks each field access of the context.
    unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk }
}

#[inline(always)]
fn find(socket: *mut bpf_sock, flags: u64) -> *mut Socket {
    // SAFETY: map and socket are what the helper takes; the verifier checks both.
    unsafe { bpf_sk_storage_get(map(), socket.cast(), core::ptr::null_mut(), flags) }.cast()
}

#[inline(always)]
fn noted<'a>(place: *const Socket) -> Option<&'a Socket> {
    // SAFETY: the place is the socket's own and there until the program ends. `connect` wrote it before the socket had a peer.
    unsafe { place.as_ref() }
}

#[inline(always)]
fn map() -> *mut c_void {
    (&raw const SOCKETS).cast_mut().cast()
}
