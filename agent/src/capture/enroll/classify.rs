//! What a network namespace is to the mesh, and what has to happen to make the kernel agree. Pure.
//!
//! Enters: the namespace's addresses, the snapshot, and what the namespace was so far. Leaves: one [`Step`]. Whatever cannot be told
//! leaves the namespace closed; a pod that was enrolled stays so until something says otherwise.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use culvert_ebpf_common::Admission;

use crate::capture::maps::PortAdmissions;
use crate::model::{Mode, Snapshot, Workload};

/// What a namespace is, as far as its addresses tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// The controller has not said anything yet.
    Unsynced,
    /// It has no address that could be a pod's.
    NoAddress,
    /// Only the controller can tell what has this address.
    Ask(IpAddr),
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

/// Tells what has these addresses. `unknown` are the addresses that the controller has said to be nobody's.
pub(super) fn classify(addresses: &BTreeSet<IpAddr>, phase: &Phase, snapshot: &Snapshot, unknown: &BTreeSet<IpAddr>) -> Standing {
    if !snapshot.synced() {
        return Standing::Unsynced;
    }
    if addresses.is_empty() {
        return Standing::NoAddress;
    }
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
        | (Phase::Pending | Phase::Inherited, Standing::NoAddress)
        | (Phase::Exempt, Standing::Exempt) => Step::Stay,
        (Phase::Exempt | Phase::Enrolled(_), Standing::NoAddress) => Step::Close,
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
