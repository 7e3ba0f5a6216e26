//! Connections between two enrolled pods of one node that stay in the kernel.
//!
//! The agent carries the first connection of a pair and leaves a verdict. By that, `connect` lets later ones go as they were dialled,
//! `sock_ops` attests them before their first packet, and `sk_lookup` in the destination's namespace takes them for what they are. A
//! verdict is as good as the generations of both pods, which the agent moves with every change, and as the agent itself: while the
//! source's listener is not there, none is. Both sockets are followed to their ends, since only who sent bytes knows surely how many
//! arrived: a count of bytes received may or may not have the peer's FIN in it, one of bytes acknowledged tells by its sequence.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_NOEXIST, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_TCP_CLOSE_WAIT, BPF_TCP_CLOSING, BPF_TCP_FIN_WAIT2, BPF_TCP_LAST_ACK,
};
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::{bpf_get_socket_cookie, bpf_ktime_get_ns, bpf_map_lookup_elem, bpf_sk_release};
use aya_ebpf::programs::SockOpsContext;
use culvert_ebpf_common::{
    Address, Connection, ConnectionEvent, Endpoint, Flow, ListenerKey, ListenerRole, Namespace, NamespaceState, Outcome, Socket,
    SocketKind, Stage, VerdictKey,
};

use crate::maps::{ATTESTED, CONNECTION_EVENTS, CONNECTIONS, HALF_ENDED, LISTENERS, NAMESPACES, VERDICTS};
use crate::{note, outcome};

/// Which end of a connection, in `HALF_ENDED`; 0 is neither.
const SOURCE: u32 = 1;
const DESTINATION: u32 = 2;
/// Beside the end: it was closed in order.
const IN_ORDER: u32 = 4;
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
pub(crate) fn connecting(ctx: &SockOpsContext, socket: &Socket, flow: Flow) {
    let cookie = cookie(ctx);
    // SAFETY: an address is read at once.
    let own = unsafe { NAMESPACES.get(socket.source()) }.map(|namespace| namespace.own(flow.source.address().is_v4()));
    if own.is_none_or(|own| !flow.is_from(own)) {
        give_back(socket.source(), flow.destination);
        return outcome::count(Outcome::UnattestedSameNode);
    }
    let kept = CONNECTIONS.insert(cookie, socket.connection(flow), 0).is_ok()
        && ATTESTED.insert(flow, cookie, 0).is_ok()
        && ctx.set_cb_flags(BPF_SOCK_OPS_STATE_CB_FLAG as i32).is_ok();
    if !kept {
        // What could not be accounted for is not let through.
        let _was_never_there = ATTESTED.remove(flow);
        let _was_never_there = CONNECTIONS.remove(cookie);
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

/// What `sk_lookup` makes of a connection that was attested by the socket of this cookie.
#[inline(always)]
pub(crate) fn standing(socket: u64) -> Standing {
    let Some(connection) = CONNECTIONS.get_ptr_mut(socket) else { return Standing::Unknown };
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
    let cookie = cookie(ctx);
    let Some(connection) = CONNECTIONS.get_ptr_mut(cookie) else { return };
    // SAFETY: only the source's socket writes these two, and it has one state at a time.
    unsafe {
        (*connection).opened_ns = bpf_ktime_get_ns();
        (*connection).set_stage(Stage::Open);
        if !tell(cookie, &*connection) {
            outcome::count(Outcome::DelayedTelling);
        }
    }
}

/// A connection was accepted: is it one of those?
#[inline(always)]
pub(crate) fn accepted(ctx: &SockOpsContext) {
    // SAFETY: the entry is a 64-bit word, read once.
    let Some(socket) = unsafe { ATTESTED.get(crate::sock_ops::flow(ctx).reversed()) }.copied() else { return };
    let Some(connection) = CONNECTIONS.get_ptr_mut(socket) else { return };
    if ctx.set_cb_flags(BPF_SOCK_OPS_STATE_CB_FLAG as i32).is_ok() {
        // SAFETY: a word that only the destination's socket writes.
        unsafe { (*connection).accepted = cookie(ctx) };
    }
}

/// A socket that nothing is noted of is closed: is it the destination's of one of those?
#[inline(always)]
pub(crate) fn destination_closed(ctx: &SockOpsContext) {
    // SAFETY: the entry is a 64-bit word, read once.
    let Some(socket) = unsafe { ATTESTED.get(crate::sock_ops::flow(ctx).reversed()) }.copied() else { return };
    let Some(connection) = CONNECTIONS.get_ptr_mut(socket) else { return };
    // SAFETY: only the destination's socket, which is this one, writes these.
    unsafe {
        if (*connection).accepted != cookie(ctx) {
            return;
        }
        (*connection).received = acknowledged(ctx);
    }
    half_ended(ctx, socket, connection, DESTINATION);
}

/// The source's socket is closed.
#[inline(always)]
pub(crate) fn source_closed(ctx: &SockOpsContext) {
    let cookie = cookie(ctx);
    let Some(connection) = CONNECTIONS.get_ptr_mut(cookie) else { return };
    // SAFETY: only the source's socket, which is this one, writes the first; the second is a word, read once.
    let (opened, accepted) = unsafe { ((*connection).opened_ns != 0, (*connection).accepted != 0) };
    if !opened {
        if segments_in(ctx) > 0 {
            return ended(cookie, connection, Stage::Refused);
        }
        // Nothing says that the network between the two lets through more than tunnels: a NetworkPolicy may not.
        // SAFETY: as above.
        let (source, destination) = unsafe { ((*connection).source, (*connection).flow.destination) };
        give_back(source, destination);
        return ended(cookie, connection, Stage::Unanswered);
    }
    // SAFETY: as above.
    unsafe { (*connection).sent = acknowledged(ctx).saturating_sub(SYN) };
    if accepted {
        half_ended(ctx, cookie, connection, SOURCE);
    } else {
        // The destination never took it up; or it did in a socket that these programs are not asked about, and is not followed.
        // SAFETY: as above.
        unsafe { (*connection).received = received(ctx) };
        ended(cookie, connection, if fin_acknowledged(ctx) { Stage::Finished } else { Stage::SourceReset });
    }
}

/// One end is closed. Who comes second tells of the connection; the map lets only one be first.
#[inline(always)]
fn half_ended(ctx: &SockOpsContext, cookie: u64, connection: *mut Connection, side: u32) {
    let in_order = fin_acknowledged(ctx);
    if HALF_ENDED.insert(cookie, side | if in_order { IN_ORDER } else { 0 }, u64::from(BPF_NOEXIST)).is_ok() {
        return;
    }
    // SAFETY: the entry is a word, read once; nobody writes it a second time. None: there was no room for one.
    let first = unsafe { HALF_ENDED.get(cookie) }.copied().unwrap_or(0);
    // Who ends a connection out of order is closed first: its reset is not sent before.
    let stage = if in_order && first & IN_ORDER != 0 {
        Stage::Finished
    } else if first & SOURCE != 0 {
        Stage::SourceReset
    } else {
        Stage::DestinationReset
    };
    let _was_never_there = HALF_ENDED.remove(cookie);
    ended(cookie, connection, stage);
}

/// Tells of a connection's end and forgets it. What cannot be told now stays for the agent to find.
#[inline(always)]
fn ended(cookie: u64, connection: *mut Connection, stage: Stage) {
    // SAFETY: both sockets are closed, or there was only one: nobody else writes the entry any more.
    let (flow, told) = unsafe {
        if (*connection).opened_ns != 0 {
            (*connection).duration_ns = bpf_ktime_get_ns().saturating_sub((*connection).opened_ns);
        }
        (*connection).set_stage(stage);
        ((*connection).flow, tell(cookie, &*connection))
    };
    // SAFETY: the entry is a 64-bit word, read once. A later connection may have the same ends.
    if unsafe { ATTESTED.get(flow) }.copied() == Some(cookie) {
        let _gone_already = ATTESTED.remove(flow);
    }
    if told {
        let _gone_already = CONNECTIONS.remove(cookie);
    } else {
        outcome::count(Outcome::DelayedTelling);
    }
}

#[inline(always)]
fn tell(socket: u64, connection: &Connection) -> bool {
    let Some(mut event) = CONNECTION_EVENTS.reserve::<ConnectionEvent>(0) else { return false };
    event.write(ConnectionEvent { socket, connection: *connection });
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

/// The payload that the socket has received, as far as it can tell: whether a peer's FIN is among it is known of the states that follow
/// one, and taken for granted in the state before the last.
#[inline(always)]
fn received(ctx: &SockOpsContext) -> u64 {
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
