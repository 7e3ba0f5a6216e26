//! `connect()`: whether a connection leaves as it is, goes to the agent, or not at all.
//!
//! A captured connection is redirected to the pod's own address, so that the application's `getsockname()` stays true and no
//! packet is ever rewritten.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::{
    bpf_get_current_cgroup_id, bpf_get_current_pid_tgid, bpf_get_netns_cookie, bpf_getsockopt, bpf_ktime_get_ns,
};
use aya_ebpf::programs::SockAddrContext;
use aya_log_ebpf::debug;
use culvert_ebpf_common::{Address, Dispatch, Endpoint, Event, Flow, NamespaceState, OUTBOUND_PORT, Outcome, Settings, Socket};

use crate::maps::{self, AGENT_PROCESSES, CLAIMED, DESTINATIONS, NAMESPACES, SETTINGS};
use crate::{note, same_node};

pub(crate) const IPPROTO_TCP: u32 = 6;
const SOL_SOCKET: i32 = 1;
const SO_MARK: i32 = 36;

enum Decision {
    Done(Outcome),
    Redirect(Address),
}

/// A socket of IPv4 connects.
#[inline(always)]
pub(crate) fn over_ipv4(ctx: &SockAddrContext) -> Outcome {
    // SAFETY: the verifier checks each field access of the context.
    let address = Address::from_v4_word(unsafe { (*ctx.sock_addr).user_ip4 });
    match decide(ctx, address) {
        Decision::Done(outcome) => outcome,
        Decision::Redirect(own) => {
            let [_, _, _, word] = own.words();
            // SAFETY: as above.
            unsafe {
                (*ctx.sock_addr).user_ip4 = word;
                (*ctx.sock_addr).user_port = u32::from(OUTBOUND_PORT.to_be());
            }
            Outcome::Captured
        }
    }
}

/// A socket of IPv6 connects, possibly to an IPv4 address.
#[inline(always)]
pub(crate) fn over_ipv6(ctx: &SockAddrContext) -> Outcome {
    match decide(ctx, ipv6_destination(ctx)) {
        Decision::Done(outcome) => outcome,
        Decision::Redirect(own) => {
            let [a, b, c, d] = own.words();
            // SAFETY: the verifier checks each field access of the context; volatile keeps them 4 bytes wide, as it asks.
            unsafe {
                let ip = &raw mut (*ctx.sock_addr).user_ip6;
                core::ptr::write_volatile(&raw mut (*ip)[0], a);
                core::ptr::write_volatile(&raw mut (*ip)[1], b);
                core::ptr::write_volatile(&raw mut (*ip)[2], c);
                core::ptr::write_volatile(&raw mut (*ip)[3], d);
                (*ctx.sock_addr).user_port = u32::from(OUTBOUND_PORT.to_be());
            }
            Outcome::Captured
        }
    }
}

/// The IPv6 destination in the context, as `connect6` finds it.
#[inline(always)]
fn ipv6_destination(ctx: &SockAddrContext) -> Address {
    // SAFETY: the verifier checks each field access of the context; volatile keeps them 4 bytes wide, as it asks.
    unsafe {
        let ip = &raw const (*ctx.sock_addr).user_ip6;
        Address::from_v6_words([
            core::ptr::read_volatile(&raw const (*ip)[0]),
            core::ptr::read_volatile(&raw const (*ip)[1]),
            core::ptr::read_volatile(&raw const (*ip)[2]),
            core::ptr::read_volatile(&raw const (*ip)[3]),
        ])
    }
}

#[inline(always)]
fn decide(ctx: &SockAddrContext, address: Address) -> Decision {
    // SAFETY: the verifier checks each field access of the context.
    let (protocol, port) = unsafe { ((*ctx.sock_addr).protocol, (*ctx.sock_addr).user_port) };
    if protocol != IPPROTO_TCP {
        return Decision::Done(Outcome::PassedOutside);
    }
    let destination = Endpoint::new(address, u16::from_be(port as u16));
    // SAFETY: the helper takes the context that it was called for.
    let netns_cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let process = (bpf_get_current_pid_tgid() >> 32) as u32;
    let Some(settings) = SETTINGS.get(0) else { return Decision::Done(Outcome::PassedOutside) };
    if settings.agent_mark != 0 && mark(ctx) == settings.agent_mark {
        let _full = AGENT_PROCESSES.insert(process, cgroup(), 0);
        return Decision::Done(Outcome::PassedAgent);
    }
    // SAFETY: the entry is copied at once; a concurrent change of it is a change of state that either order allows.
    let Some(namespace) = (unsafe { NAMESPACES.get(netns_cookie) }) else {
        return Decision::Done(unseen(ctx, settings, netns_cookie, process, destination));
    };
    match namespace.state() {
        NamespaceState::Exempt => return Decision::Done(Outcome::PassedOutside),
        NamespaceState::Pending if address.is_local() => return Decision::Done(Outcome::PassedLocal),
        NamespaceState::Pending if is_claimed(netns_cookie) => return Decision::Done(Outcome::PassedOutside),
        NamespaceState::Pending => {
            let flow = Flow { source: Endpoint::default(), destination };
            maps::tell(&Event::unseen_namespace(process, netns_cookie, flow));
            return Decision::Done(Outcome::RefusedPending);
        }
        NamespaceState::Enrolled => {}
    }
    let own = namespace.own(address.is_v4());
    if is_agent(process) {
        if address == own {
            // Without a note of it, the pod takes it for a stranger's.
            let _noted = note::set(ctx, Socket::delivery(destination));
        }
        return Decision::Done(Outcome::PassedAgent);
    }
    let passed = if address.is_local() || address == own {
        Some(Outcome::PassedLocal)
    } else {
        match dispatch(destination) {
            Dispatch::Pass => Some(Outcome::PassedOutside),
            Dispatch::Refuse => Some(Outcome::RefusedNoEndpoint),
            Dispatch::Capture => same_node::way(namespace, netns_cookie, destination, own).and_then(|socket| {
                // Without a note of it, it would be refused.
                if note::set(ctx, socket) { Some(Outcome::PassedSameNode) } else { None }
            }),
        }
    };
    if let Some(outcome) = passed {
        if !matches!(outcome, Outcome::PassedSameNode) {
            // Lest `getpeername` tells the peer of a socket that was captured once and now connects elsewhere.
            note::unset(ctx);
        }
        return Decision::Done(outcome);
    }
    if own == Address::UNSPECIFIED || !note::set(ctx, Socket::captured(destination)) {
        return Decision::Done(Outcome::RefusedNoRoom);
    }
    Decision::Redirect(own)
}

/// A namespace that the agent has not seen: it may be a pod that has just started, so that what would leave it is refused until the
/// agent knows.
#[inline(always)]
fn unseen(ctx: &SockAddrContext, settings: &Settings, netns_cookie: u64, process: u32, destination: Endpoint) -> Outcome {
    if destination.address().is_local() {
        return Outcome::PassedLocal;
    }
    let [first, second] = settings.host_cookies;
    if netns_cookie == first || netns_cookie == second || is_agent(process) || is_claimed(netns_cookie) {
        return Outcome::PassedOutside;
    }
    // SAFETY: the helper takes nothing.
    if unsafe { bpf_ktime_get_ns() } > settings.refuse_unseen_until_ns {
        return Outcome::PassedOutside;
    }
    debug!(ctx, "connection from network namespace {} refused: not classified yet", netns_cookie);
    maps::tell(&Event::unseen_namespace(process, netns_cookie, Flow { source: Endpoint::default(), destination }));
    Outcome::RefusedUnseen
}

/// What was decided for a destination. One in the cluster's ranges that nobody has told us of is for the agent to ask about.
#[inline(always)]
fn dispatch(destination: Endpoint) -> Dispatch {
    // SAFETY: the entries are 32-bit words, read once.
    let entry = unsafe {
        match DESTINATIONS.get(destination) {
            Some(entry) => Some(entry),
            None => DESTINATIONS.get(Endpoint::new(destination.address(), 0)),
        }
    };
    match entry {
        Some(entry) => Dispatch::from_u32(*entry),
        None if maps::in_cluster(destination.address().octets()) => Dispatch::Capture,
        None => Dispatch::Pass,
    }
}

/// Whether another agent answers for the namespace. Its own programs say what may leave it.
#[inline(always)]
fn is_claimed(netns_cookie: u64) -> bool {
    // SAFETY: only the entry's presence is looked at.
    unsafe { CLAIMED.get(netns_cookie) }.is_some()
}

/// The number of an agent that is gone may become an application's: its cgroup tells them apart.
#[inline(always)]
fn is_agent(process: u32) -> bool {
    // SAFETY: the entry is a 64-bit word, read once.
    unsafe { AGENT_PROCESSES.get(process) }.is_some_and(|noted| *noted == cgroup())
}

/// The cgroup of the calling process, by its number; never 0.
#[inline(always)]
fn cgroup() -> u64 {
    // SAFETY: the helper takes nothing.
    unsafe { bpf_get_current_cgroup_id() }
}

/// The socket's mark; 0 when it cannot be read.
#[inline(always)]
fn mark(ctx: &SockAddrContext) -> u32 {
    let mut mark = 0_u32;
    // SAFETY: the buffer is four bytes of this stack frame, as said in the last argument.
    let failed = unsafe { bpf_getsockopt(ctx.as_ptr(), SOL_SOCKET, SO_MARK, (&raw mut mark).cast(), 4) };
    if failed == 0 { mark } else { 0 }
}
