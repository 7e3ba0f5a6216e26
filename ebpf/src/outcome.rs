//! One place where outcomes become the kernel's return codes, and are counted.

use aya_ebpf::bindings::sk_action;
use aya_ebpf::helpers::bpf_set_retval;
use culvert_ebpf_common::Outcome;

use crate::maps::OUTCOMES;

/// A cgroup program's "go on".
pub(crate) const ALLOW: i32 = 1;
const REFUSE: i32 = 0;
const ECONNREFUSED: i32 = 111;
const ENETUNREACH: i32 = 101;

/// Set by the loader where the kernel has `bpf_set_retval` (Linux 5.18). Without it a refused `connect` says EPERM.
#[unsafe(no_mangle)]
static HAS_SET_RETVAL: u32 = 0;

/// The return code of a connect program.
#[inline(always)]
pub(crate) fn of_connect(outcome: Outcome) -> i32 {
    count(outcome);
    match outcome {
        Outcome::Captured | Outcome::PassedOutside | Outcome::PassedLocal | Outcome::PassedAgent | Outcome::PassedSameNode => {
            ALLOW
        }
        // What a pod without an address of that family hears without a mesh.
        Outcome::RefusedNoRoom => refuse(ENETUNREACH),
        _ => refuse(ECONNREFUSED),
    }
}

/// The return code of the `sk_lookup` program. Steered connections have their socket assigned already.
#[inline(always)]
pub(crate) fn of_lookup(outcome: Outcome) -> u32 {
    count(outcome);
    match outcome {
        Outcome::AdmittedDelivery
        | Outcome::AdmittedPlaintext
        | Outcome::AdmittedLocal
        | Outcome::AdmittedProbe
        | Outcome::AdmittedSameNode
        | Outcome::SteeredSameNode
        | Outcome::SteeredPlaintext
        | Outcome::SteeredTunnel
        | Outcome::SteeredCaptured => sk_action::SK_PASS,
        _ => sk_action::SK_DROP,
    }
}

#[inline(always)]
fn refuse(error: i32) -> i32 {
    // SAFETY: a read of this program's own read-only data; volatile, because the loader may have set it.
    if unsafe { core::ptr::read_volatile(&HAS_SET_RETVAL) } != 0 {
        // SAFETY: the helper takes a plain number.
        unsafe { bpf_set_retval(-error) };
    }
    REFUSE
}

/// Counts what is no answer to the kernel.
#[inline(always)]
pub(crate) fn count(outcome: Outcome) {
    if let Some(counter) = OUTCOMES.get_ptr_mut(outcome as u32) {
        // SAFETY: the pointer is to this CPU's own, live slot.
        unsafe { *counter += 1 };
    }
}
