//! What a network namespace is to the mesh, and what has to happen to make the kernel agree. Pure.
//!
//! Enters: the namespace's addresses, its pod if the node has said, the snapshot, and what the namespace was so far. Leaves: one
//! [`Step`]. Whatever cannot be told leaves the namespace closed; a pod that was enrolled stays so until something says otherwise.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use culvert_ebpf_common::Admission;

use super::pods::Owner;
use crate::capture::maps::PortAdmissions;
use crate::model::{Mode, PodAddresses, Snapshot, Workload};

/// What a namespace is, as far as its pod and its addresses tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// The controller has not said anything yet.
    Unsynced,
    /// It has no address that could be a pod's.
    NoAddress,
    /// Only the controller can tell what has this address.
    Ask(IpAddr),
    /// Its pod is known, but not with which of its addresses, or the controller knows them as another's.
    Disputed,
    /// Not ours: a pod outside of the mesh, a pod of another node, or no pod.
    Exempt,
    /// This workload, which is in the mesh and on this node.
    Member(Arc<Workload>),
}

/// What a namespace is in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing leaves it.
    Pending,
    /// None of ours.
    Exempt,
    /// A predecessor enrolled it; its listeners are gone, its programs are not.
    Inherited,
    /// Enrolled as this workload.
    Enrolled(Arc<Workload>),
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing.
    Stay,
    /// Ask the controller, and stay.
    Ask(IpAddr),
    /// Let nothing out; of an enrolled pod, end the enrolment but keep its programs.
    Close,
    /// Leave it alone; of an enrolled pod, end the enrolment.
    Exempt,
    /// Enrol it.
    Enrol(Arc<Workload>),
    /// End the enrolment, keep it closed, and enrol it as this.
    Reenrol(Arc<Workload>),
    /// It is enrolled already: look at what it accepts.
    Update(Arc<Workload>),
}

/// Tells what has these addresses, and is the pod `owner`. `unknown` are the addresses that the controller has said to be nobody's.
pub(super) fn classify(
    addresses: &BTreeSet<IpAddr>,
    owner: Option<&Owner>,
    phase: &Phase,
    snapshot: &Snapshot,
    unknown: &BTreeSet<IpAddr>,
) -> Standing {
    if !snapshot.synced() {
        return Standing::Unsynced;
    }
    if addresses.is_empty() {
        return Standing::NoAddress;
    }
    if let Some(pod) = owner.and_then(|owner| snapshot.pod(&owner.uid)) {
        return by_pod(pod, addresses, phase, snapshot);
    }
    if let Some(owner) = owner
        && owner.uid.is_of_the_api()
        && snapshot.of_every_pod()
        && addresses.iter().filter_map(|address| snapshot.workload_at(*address)?.pod.as_deref()).any(|pod| *pod != owner.uid)
    {
        // The controller has not told of it yet, or of its end, or withholds it for the sake of the other.
        return Standing::Disputed;
    }
    if let Some(own) = owner.and_then(|owner| owner.workload.as_deref())
        && *phase != Phase::Exempt
        && addresses.iter().all(|address| snapshot.workload_at(*address).is_none_or(|there| *there.uid != *own))
        && is_anothers(addresses, snapshot)
    {
        return Standing::Disputed;
    }
    by_address(addresses, phase, snapshot, unknown)
}

/// Tells what a namespace is whose pod the controller knows.
fn by_pod(pod: &Arc<Workload>, addresses: &BTreeSet<IpAddr>, phase: &Phase, snapshot: &Snapshot) -> Standing {
    let own = |address: &IpAddr| snapshot.workload_at(*address).is_some_and(|there| there.uid == pod.uid);
    if addresses.iter().any(own) {
        return if pod.enrolled() { Standing::Member(Arc::clone(pod)) } else { Standing::Exempt };
    }
    if !pod.enrolled() && !pod.host_network && *phase == Phase::Exempt {
        return Standing::Exempt;
    }
    // Nobody has said that the address is the pod's: it is so as long as it is nobody else's.
    if pod.host_network || is_anothers(addresses, snapshot) {
        return Standing::Disputed;
    }
    if !pod.enrolled() {
        return Standing::Exempt;
    }
    let current = match phase {
        Phase::Enrolled(current) if current.uid == pod.uid && current.pod == pod.pod => Some(current),
        Phase::Enrolled(_) | Phase::Pending | Phase::Exempt | Phase::Inherited => None,
    };
    let kept = current.filter(|current| current.addresses.iter().any(|address| addresses.contains(address)));
    let Some(own) = kept.map_or_else(|| one_a_family(addresses), |current| Some(current.addresses)) else {
        return Standing::Disputed;
    };
    let workload = Workload { addresses: own, ..Workload::clone(pod) };
    match current {
        Some(current) if **current == workload => Standing::Member(Arc::clone(current)),
        Some(_) | None => Standing::Member(Arc::new(workload)),
    }
}

/// Whether the controller knows one of these addresses as a workload's or a service's.
fn is_anothers(addresses: &BTreeSet<IpAddr>, snapshot: &Snapshot) -> bool {
    addresses.iter().any(|address| snapshot.workload_at(*address).is_some() || snapshot.service_at(*address).is_some())
}

/// The addresses of a pod that has these. None: which of several are its own cannot be told.
fn one_a_family(addresses: &BTreeSet<IpAddr>) -> Option<PodAddresses> {
    let mut own = PodAddresses::default();
    addresses.iter().try_for_each(|address| own.add(*address)).ok().map(|()| own)
}

fn by_address(addresses: &BTreeSet<IpAddr>, phase: &Phase, snapshot: &Snapshot, unknown: &BTreeSet<IpAddr>) -> Standing {
    let ours = |workload: &Workload| workload.enrolled() && *workload.node == *snapshot.node();
    if let Phase::Enrolled(current) = phase
        && let Some(workload) = snapshot.workload(&current.uid)
        && workload.addresses.iter().any(|address| addresses.contains(address))
    {
        return if ours(workload) { Standing::Member(Arc::clone(workload)) } else { Standing::Exempt };
    }
    let known = || addresses.iter().filter_map(|address| snapshot.workload_at(*address));
    if let Some(workload) = known().find(|workload| ours(workload)) {
        return Standing::Member(Arc::clone(workload));
    }
    if known().next().is_some() {
        return Standing::Exempt;
    }
    if let Phase::Enrolled(current) = phase
        && current.addresses.iter().any(|address| addresses.contains(address))
    {
        // Its object is gone, but the pod still runs: it may not talk more freely than before.
        return Standing::Member(Arc::clone(current));
    }
    match addresses.iter().find(|address| !unknown.contains(address)) {
        Some(address) => Standing::Ask(*address),
        None => Standing::Exempt,
    }
}

/// Tells what leads from `phase` to `standing`.
pub(super) fn next(phase: &Phase, standing: Standing) -> Step {
    match (phase, standing) {
        (_, Standing::Unsynced)
        | (Phase::Pending | Phase::Inherited, Standing::NoAddress | Standing::Disputed)
        | (Phase::Exempt, Standing::Exempt) => Step::Stay,
        (Phase::Exempt | Phase::Enrolled(_), Standing::NoAddress | Standing::Disputed) => Step::Close,
        (Phase::Pending | Phase::Exempt | Phase::Inherited, Standing::Ask(address)) => Step::Ask(address),
        // It has none of the addresses that it was enrolled for.
        (Phase::Enrolled(_), Standing::Ask(_)) => Step::Close,
        (Phase::Pending | Phase::Inherited | Phase::Enrolled(_), Standing::Exempt) => Step::Exempt,
        (Phase::Pending | Phase::Exempt | Phase::Inherited, Standing::Member(workload)) => Step::Enrol(workload),
        (Phase::Enrolled(current), Standing::Member(workload)) => {
            let same = current.uid == workload.uid
                && current.identity == workload.identity
                && same_addresses(&current.addresses, &workload.addresses);
            if same { Step::Update(workload) } else { Step::Reenrol(workload) }
        }
    }
}

fn same_addresses(one: &[IpAddr], other: &[IpAddr]) -> bool {
    one.len() == other.len() && one.iter().all(|address| other.contains(address))
}

/// What the workload's ports take in plaintext.
pub(super) fn admissions(workload: &Workload, snapshot: &Snapshot) -> PortAdmissions {
    let (policies, missing) = snapshot.policies_for(workload);
    let judged = snapshot.default_deny() || !policies.is_empty() || !missing.is_empty();
    let admission = |mode| match mode {
        Mode::Strict => Admission::Drop,
        Mode::Permissive | Mode::Disable if judged => Admission::Steer,
        Mode::Permissive | Mode::Disable => Admission::Pass,
    };
    let modes = &workload.peer_authentication;
    let ports = modes.ports.iter().filter(|(port, _)| **port != 0).map(|(port, mode)| (*port, admission(*mode)));
    let rest = admission(modes.mode);
    ports.filter(|(_, own)| *own != rest).chain([(0, rest)]).collect()
}

#[cfg(test)]
mod tests;
