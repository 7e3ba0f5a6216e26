//! Connections between two enrolled pods of one node that stay in the kernel.
//!
//! The agent carries the first connection of a pair and leaves a verdict. By that, `connect` lets later ones go as they were dialled,
//! `sock_ops` attests them before their first packet, and `sk_lookup` in the destination's namespace takes them for what they are. A
//! verdict is as good as the generations of both pods, which the agent moves with every change, and as the agent itself: while the
//! source's listener is not there, none is. Both sockets are followed to their ends, since only who sent bytes knows surely how many
//! arrived: a count of bytes received may or may not have the peer's FIN in it, one of bytes acknowledged tells by its sequence.

use core::arch::asm;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_NOEXIST, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_TCP_CLOSE_WAIT, BPF_TCP_CLOSING, BPF_TCP_FIN_WAIT2, BPF_TCP_LAST_ACK,
};
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_ktime_get_ns, bpf_map_lookup_elem, bpf_sk_release};
use aya_ebpf::programs::SockOpsContext;
use culvert_ebpf_common::{
    Address, Connection, Endpoint, Flow, ListenerKey, ListenerRole, Namespace, NamespaceState, Outcome, Socket, SocketKind,
    Stage, VerdictKey,
};

use crate::maps::{CONNECTION_EVENTS, CONNECTIONS, LISTENERS, NAMESPACES, UNTOLD, VERDICTS};
use crate::{note, outcome, sock_ops};

/// Which end of a connection is closed.
const SOURCE: u64 = 1;
const DESTINATION: u64 = 2;
/// An end's bit, moved by so many: it was closed in order.
const IN_ORDER: u64 = 2;
/// Another connection has the ends, and takes the place of this one.
const REPLACED: u64 = 16;
/// The place is given up.
const REMOVED: u64 = 32;
/// How an entry is inserted where none may be, and where one may.
const VACANT: u64 = BPF_NOEXIST as u64;
const TAKEN_OVER: u64 = 0;
/// What an active end's count of acknowledged bytes has beside its payload.
const SYN: u64 = 1;
const FIN: u64 = 1;

/// What a connection that was attested is now.
pub(crate) enum Standing {
    /// As when it was let go.
    Valid,
    /// The destination has changed since.
    Stale,
    /// Nothing is known of it any more.
    Unknown,
}

/// What is to be noted of a connection from `namespace` that may go straight to the pod at `destination`; none when the agent has it.
#[inline(always)]
pub(crate) fn way(namespace: &Namespace, source: u64, destination: Endpoint, own: Address) -> Option<Socket> {
    // SAFETY: the entry is copied at once; what another entry may have put there meanwhile is found out below.
    let verdict = *unsafe { VERDICTS.get(VerdictKey::new(source, destination)) }?;
    if verdict.source_generation != namespace.generation() {
        return None;
    }
    // SAFETY: as above.
    let far = unsafe { NAMESPACES.get(verdict.destination) }?;
    let holds = is_as_of(far, verdict.destination_generation) && far.own(destination.address().is_v4()) == destination.address();
    // SAFETY: the helper takes nothing.
    let expired = unsafe { bpf_ktime_get_ns() } >= verdict.expires_ns;
    if !holds || expired || !agent_listens(own) {
        return None;
    }
    Some(Socket::same_node(destination, source, verdict.destination, verdict.destination_generation))
}

#[inline(always)]
fn is_as_of(namespace: &Namespace, generation: u64) -> bool {
    matches!(namespace.state(), NamespaceState::Enrolled) && namespace.generation() == generation
}

/// Whether there is an agent that would take the pod's captured connections: with it goes its listener, and its power to void a verdict.
#[inline(always)]
fn agent_listens(own: Address) -> bool {
    let key = ListenerKey::new(own, ListenerRole::Outbound);
    let map = (&raw const LISTENERS).cast_mut().cast::<c_void>();
    // SAFETY: the map is one of sockets, and the key of its type; the verifier checks both.
    let listener = unsafe { bpf_map_lookup_elem(map, (&raw const key).cast()) };
    if listener.is_null() {
        return false;
    }
    // SAFETY: the lookup has given a reference to a socket.
    unsafe { bpf_sk_release(listener) };
    true
}

/// A connection that `connect` has let go has its source port, and sends nothing yet: it is attested.
#[inline(always)]
pub(crate) fn connecting(ctx: &SockOpsContext, socket: &Socket, flow: &Flow) {
    // SAFETY: an address is read at once.
    let own = unsafe { NAMESPACES.get(socket.source()) }.map(|namespace| namespace.own(flow.source.address().is_v4()));
    if own.is_none_or(|own| !flow.is_from(own)) {
        give_back(socket.source(), flow.destination);
        return outcome::count(Outcome::UnattestedSameNode);
    }
    let connection = socket.connection(*flow, cookie(ctx));
    // One with the same ends whose source is gone: its destination is not closed yet, and will find this one in its place.
    let kept =
        CONNECTIONS.insert(flow, &connection, VACANT).is_ok() || CONNECTIONS.insert(flow, &connection, abandon(flow)).is_ok();
    if !kept || ctx.set_cb_flags(BPF_SOCK_OPS_STATE_CB_FLAG as i32).is_err() {
        // What could not be accounted for is attested to nobody; the agent has room for the next.
        let _was_never_there = CONNECTIONS.remove(flow);
        give_back(socket.source(), flow.destination);
        outcome::count(Outcome::UnattestedSameNode);
    }
}

/// Leaves what comes from `source` to `destination` to the agent until one of the pods changes.
#[inline(always)]
fn give_back(source: u64, destination: Endpoint) {
    if let Some(verdict) = VERDICTS.get_ptr_mut(VerdictKey::new(source, destination)) {
        // SAFETY: a word of an entry that only the agent writes besides; whichever comes last is right.
        unsafe { (*verdict).destination_generation = 0 };
    }
}

/// What `sk_lookup` makes of a connection.
#[inline(always)]
pub(crate) fn standing(flow: Flow) -> Standing {
    let Some(connection) = CONNECTIONS.get_ptr_mut(flow) else { return Standing::Unknown };
    // SAFETY: these two are written once, before the first packet.
    let (destination, generation) = unsafe { ((*connection).destination, (*connection).generation) };
    // SAFETY: the entry is read at once.
    if unsafe { NAMESPACES.get(destination) }.is_some_and(|namespace| is_as_of(namespace, generation)) {
        return Standing::Valid;
    }
    // SAFETY: a word that only this program writes.
    unsafe { (*connection).steered = 1 };
    Standing::Stale
}

/// The source's socket is connected.
#[inline(always)]
pub(crate) fn established(ctx: &SockOpsContext) {
    if !note::of(ctx).is_some_and(|socket| matches!(socket.kind(), SocketKind::SameNode)) {
        return;
    }
    let Some(connection) = of_source(ctx) else { return };
    // SAFETY: only the source's socket writes these two, and it has one state at a time.
    unsafe {
        (*connection).open_ns = bpf_ktime_get_ns();
        (*connection).set_stage(Stage::Open);
    }
    if !tell(connection) {
        outcome::count(Outcome::DelayedTelling);
    }
}

/// A connection was accepted: is it one of those?
#[inline(always)]
pub(crate) fn accepted(ctx: &SockOpsContext) {
    let Some(connection) = CONNECTIONS.get_ptr_mut(sock_ops::flow(ctx).reversed()) else { return };
    // SAFETY: the helper takes the context that it was called for; a word that is written once, before there was an entry.
    let here = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) == (*connection).destination };
    // A namespace of somebody's own may have the pod's address, too.
    if here && ctx.set_cb_flags(BPF_SOCK_OPS_STATE_CB_FLAG as i32).is_ok() {
        // SAFETY: a word that only the destination's socket writes.
        unsafe { (*connection).accepted = cookie(ctx) };
    }
}

/// A socket that nothing is noted of is closed: is it the destination's of one of those?
#[inline(always)]
pub(crate) fn destination_closed(ctx: &SockOpsContext) {
    let Some(connection) = CONNECTIONS.get_ptr_mut(sock_ops::flow(ctx).reversed()) else { return };
    // SAFETY: only the destination's socket, which is this one, writes these.
    unsafe {
        if (*connection).accepted != cookie(ctx) {
            return;
        }
        (*connection).received = acknowledged(ctx);
    }
    half_ended(ctx, connection, DESTINATION, SOURCE);
}

/// The source's socket is closed.
#[inline(always)]
pub(crate) fn source_closed(ctx: &SockOpsContext) {
    let Some(connection) = of_source(ctx) else { return };
    // SAFETY: only the source's socket, which is this one, writes the first; the second is a word, read once.
    let (opened, accepted) = unsafe { ((*connection).open_ns != 0, (*connection).accepted != 0) };
    if !opened {
        if segments_in(ctx) > 0 {
            return ended(connection, Stage::Refused);
        }
        // Nothing says that the network between the two lets through more than tunnels: a NetworkPolicy may not.
        // SAFETY: as above.
        let (source, destination) = unsafe { ((*connection).source, (*connection).flow.destination) };
        give_back(source, destination);
        return ended(connection, Stage::Unanswered);
    }
    // SAFETY: as above.
    unsafe {
        (*connection).sent = acknowledged(ctx).saturating_sub(SYN);
        (*connection).arrived = arrived(ctx);
    }
    if accepted {
        half_ended(ctx, connection, SOURCE, DESTINATION);
    } else {
        // The destination never took it up; or it did in a socket that these programs are not asked about, and is not followed.
        ended_alone(connection, fin_acknowledged(ctx));
    }
}

/// The connection of which this is the source's socket.
#[inline(always)]
fn of_source(ctx: &SockOpsContext) -> Option<*mut Connection> {
    let connection = CONNECTIONS.get_ptr_mut(sock_ops::flow(ctx))?;
    // SAFETY: a word that is written once, before there was an entry.
    if unsafe { (*connection).socket } == cookie(ctx) { Some(connection) } else { None }
}

/// Tells of a connection whose ends another has now. Returns how that is inserted.
#[inline(always)]
fn abandon(flow: &Flow) -> u64 {
    let Some(connection) = CONNECTIONS.get_ptr_mut(flow) else { return VACANT };
    let closed = close(connection, SOURCE | DESTINATION | REPLACED);
    if closed & REMOVED != 0 {
        return VACANT;
    }
    if closed & DESTINATION == 0 {
        ended_alone(connection, closed & (SOURCE << IN_ORDER) != 0);
    }
    TAKEN_OVER
}

/// One end is closed. Who comes second tells of the connection.
#[inline(always)]
fn half_ended(ctx: &SockOpsContext, connection: *mut Connection, this: u64, other: u64) {
    let in_order = fin_acknowledged(ctx);
    let first = close(connection, if in_order { this | this << IN_ORDER } else { this });
    if first & this != 0 || first & other == 0 {
        return;
    }
    // Who ends a connection out of order is closed first: its reset is not sent before.
    let stage = if in_order && first & (other << IN_ORDER) != 0 {
        Stage::Finished
    } else if other == SOURCE {
        Stage::SourceReset
    } else {
        Stage::DestinationReset
    };
    ended(connection, stage);
}

/// Notes ends that are closed, or what becomes of the entry. Returns what was noted before: of two that come at once, one is first.
#[inline(always)]
fn close(connection: *mut Connection, ends: u64) -> u64 {
    let mut closed = ends;
    // SAFETY: an atomic operation on an aligned word of the entry. `core` has none for this target that returns what was there.
    unsafe {
        asm!("{closed} = atomic_fetch_or((u64 *)({word} + 0), {closed})", closed = inout(reg) closed, word = in(reg) &raw mut (*connection).closed);
    }
    closed
}

/// The same as [`ended`], when only the source has told how many bytes there were.
#[inline(always)]
fn ended_alone(connection: *mut Connection, in_order: bool) {
    // SAFETY: the source's socket is closed, and the destination's is not followed, or no more.
    unsafe { (*connection).received = (*connection).arrived };
    ended(connection, if in_order { Stage::Finished } else { Stage::SourceReset });
}

/// Tells of a connection's end and forgets it. What cannot be told now is kept for the agent to find.
#[inline(always)]
fn ended(connection: *mut Connection, stage: Stage) {
    // SAFETY: both sockets are closed, or only one is followed: nobody else writes these any more.
    unsafe {
        if (*connection).open_ns != 0 {
            (*connection).open_ns = bpf_ktime_get_ns().saturating_sub((*connection).open_ns);
        }
        (*connection).set_stage(stage);
        if !tell(connection) {
            outcome::count(Outcome::DelayedTelling);
            let _full = UNTOLD.insert((*connection).socket, &*connection, 0);
        }
        // What takes the place is inserted over this one; or, from here on, only when this one is gone.
        if close(connection, REMOVED) & REPLACED == 0 {
            let _gone_already = CONNECTIONS.remove((*connection).flow);
        }
    }
}

#[inline(always)]
fn tell(connection: *const Connection) -> bool {
    let Some(mut event) = CONNECTION_EVENTS.reserve::<Connection>(0) else { return false };
    // SAFETY: both are there, one of them reserved just now, and as large as what is copied.
    unsafe { core::ptr::copy_nonoverlapping(connection, event.as_mut_ptr(), 1) };
    event.submit(0);
    true
}

#[inline(always)]
fn cookie(ctx: &SockOpsContext) -> u64 {
    // SAFETY: the helper takes the context that it was called for.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

/// The payload that the peer's kernel has received, and a connecting socket's SYN.
#[inline(always)]
fn acknowledged(ctx: &SockOpsContext) -> u64 {
    // SAFETY: the verifier checks each field access of the context; volatile keeps each where and as wide as it is.
    let bytes = unsafe { core::ptr::read_volatile(&raw const (*ctx.ops).bytes_acked) };
    if fin_acknowledged(ctx) { bytes.saturating_sub(FIN) } else { bytes }
}

/// The payload that the source's socket has received, as far as it can tell: whether a peer's FIN is among it is known of the states that follow
/// one, and taken for granted in the state before the last.
#[inline(always)]
fn arrived(ctx: &SockOpsContext) -> u64 {
    // SAFETY: as above.
    let bytes = unsafe { core::ptr::read_volatile(&raw const (*ctx.ops).bytes_received) };
    match ctx.arg(0) {
        BPF_TCP_FIN_WAIT2 | BPF_TCP_CLOSING | BPF_TCP_LAST_ACK | BPF_TCP_CLOSE_WAIT => bytes.saturating_sub(FIN),
        _ => bytes,
    }
}

/// Whether the socket's own FIN has arrived, by the state that it was in before it was closed: only then does its peer know that no more
/// comes.
#[inline(always)]
fn fin_acknowledged(ctx: &SockOpsContext) -> bool {
    // SAFETY: as above.
    let (unacknowledged, next) = unsafe {
        (core::ptr::read_volatile(&raw const (*ctx.ops).snd_una), core::ptr::read_volatile(&raw const (*ctx.ops).snd_nxt))
    };
    match ctx.arg(0) {
        BPF_TCP_FIN_WAIT2 => true,
        BPF_TCP_CLOSING | BPF_TCP_LAST_ACK => unacknowledged == next,
        _ => false,
    }
}

/// How many segments the socket has received.
#[inline(always)]
fn segments_in(ctx: &SockOpsContext) -> u32 {
    // SAFETY: as above.
    unsafe { core::ptr::read_volatile(&raw const (*ctx.ops).segs_in) }
}
