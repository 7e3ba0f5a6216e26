//! Socket lookup in a pod's network namespace: who takes a new connection to the pod, if anybody.
//!
//! Runs once for a connection (again for its ACK under SYN cookies), never for the packets of one that exists. The
//! application's own socket takes what the agent opened, the kubelet's probes, and what plaintext the mode lets through; the agent's listeners take
//! peers' tunnels, captured connections and the plaintext that needs a decision; the rest is dropped, which the client sees as
//! a refused connection.

use aya_ebpf::programs::SkLookupContext;
use culvert_ebpf_common::{
    Address, Admission, Endpoint, Event, Flow, HBONE_PORT, ListenerKey, ListenerRole, OUTBOUND_PORT, Outcome,
};

use crate::maps::{self, ADMISSIONS, CAPTURED, DELIVERIES, KUBELET_FLOWS, LISTENERS};
use crate::same_node::{self, Standing};

const AF_INET: u32 = 2;
const IPPROTO_TCP: u32 = 6;

/// Decides who takes the connection.
#[inline(always)]
pub(crate) fn admit(ctx: &SkLookupContext) -> Outcome {
    // SAFETY: the verifier checks each field access of the context.
    if unsafe { (*ctx.lookup).protocol } != IPPROTO_TCP {
        return Outcome::AdmittedLocal;
    }
    let flow = flow(ctx);
    let Flow { source, destination } = flow;
    if destination.address().is_local() {
        return Outcome::AdmittedLocal;
    }
    if source.address() == destination.address() {
        // The pod to itself: either captured, or the application's own affair.
        // SAFETY: only the entry's presence is looked at.
        if destination.port() == OUTBOUND_PORT && unsafe { CAPTURED.get(source) }.is_some() {
            return steer(ctx, destination.address(), ListenerRole::Outbound, Outcome::SteeredCaptured);
        }
        return Outcome::AdmittedLocal;
    }
    // SAFETY: only the entry's presence is looked at.
    if unsafe { DELIVERIES.get(flow) }.is_some() {
        return Outcome::AdmittedDelivery;
    }
    match same_node::standing(flow) {
        Standing::Valid => return Outcome::AdmittedSameNode,
        Standing::Stale => return steer(ctx, destination.address(), ListenerRole::Plaintext, Outcome::SteeredSameNode),
        Standing::Unknown => {}
    }
    // SAFETY: only the entry's presence is looked at.
    if unsafe { KUBELET_FLOWS.get(flow) }.is_some() {
        return Outcome::AdmittedProbe;
    }
    if destination.port() == HBONE_PORT {
        return steer(ctx, destination.address(), ListenerRole::Hbone, Outcome::SteeredTunnel);
    }
    match admission(destination) {
        Admission::Pass => Outcome::AdmittedPlaintext,
        Admission::Steer => steer(ctx, destination.address(), ListenerRole::Plaintext, Outcome::SteeredPlaintext),
        Admission::Drop => {
            maps::tell(&Event::plaintext_refused(flow));
            Outcome::DroppedPlaintext
        }
    }
}

#[inline(always)]
fn admission(destination: Endpoint) -> Admission {
    // SAFETY: the entries are 32-bit words, read once.
    let entry = unsafe {
        match ADMISSIONS.get(destination) {
            Some(entry) => Some(entry),
            None => ADMISSIONS.get(Endpoint::new(destination.address(), 0)),
        }
    };
    entry.map_or(Admission::Drop, |entry| Admission::from_u32(*entry))
}

#[inline(always)]
fn steer(ctx: &SkLookupContext, address: Address, role: ListenerRole, steered: Outcome) -> Outcome {
    match LISTENERS.redirect_sk_lookup(ctx, ListenerKey::new(address, role), 0) {
        Ok(()) => steered,
        Err(_) => Outcome::DroppedNoListener,
    }
}

/// Both ends of the connection, the far end first.
#[inline(always)]
fn flow(ctx: &SkLookupContext) -> Flow {
    // SAFETY: the verifier checks each field access of the context; volatile keeps them 4 bytes wide, as it asks.
    unsafe {
        let lookup = ctx.lookup;
        let (remote, local) = if (*lookup).family == AF_INET {
            (Address::from_v4_word((*lookup).remote_ip4), Address::from_v4_word((*lookup).local_ip4))
        } else {
            let words = |ip: *const [u32; 4]| {
                Address::from_v6_words([
                    core::ptr::read_volatile(&raw const (*ip)[0]),
                    core::ptr::read_volatile(&raw const (*ip)[1]),
                    core::ptr::read_volatile(&raw const (*ip)[2]),
                    core::ptr::read_volatile(&raw const (*ip)[3]),
                ])
            };
            (words(&raw const (*lookup).remote_ip6), words(&raw const (*lookup).local_ip6))
        };
        let remote_port = u16::from_be((*lookup).remote_port);
        Flow { source: Endpoint::new(remote, remote_port), destination: Endpoint::new(local, (*lookup).local_port as u16) }
    }
}
