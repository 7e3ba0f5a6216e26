//! The kubelet's connections, seen at the root of the node's cgroups: its probes reach a pod in every mode.
//!
//! What runs by a kubelet's name, as root, in the node's own network and outside of the pods' part of the tree is the kubelet. A pod
//! in the node's network is below that part, whatever it calls itself, and nothing that it sends is in the table of flows. `connect` notes
//! the socket; before the first packet leaves, the flow is filed where `sk_lookup` finds it in the pod.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE};
use aya_ebpf::helpers::{
    bpf_get_current_ancestor_cgroup_id, bpf_get_current_comm, bpf_get_current_uid_gid, bpf_get_netns_cookie,
    bpf_get_socket_cookie,
};
use aya_ebpf::programs::{SockAddrContext, SockOpsContext};

use crate::maps::{KUBELET_FLOWS, KUBELET_NAMES, KUBELET_SOCKETS, SETTINGS};
use crate::{connect, sock_ops};

/// The number of the cgroup that all pods are below, set by the loader. 0: there is none, and no kubelet.
#[unsafe(no_mangle)]
static PODS_CGROUP: u64 = 0;

/// How deep a process may be in the tree. One that is deeper is taken for a pod's.
const LEVELS: i32 = 32;

/// A socket connects: is it the kubelet's?
#[inline(always)]
pub(crate) fn note(ctx: &SockAddrContext) {
    // SAFETY: the verifier checks each field access of the context.
    if unsafe { (*ctx.sock_addr).protocol } != connect::IPPROTO_TCP {
        return;
    }
    if in_nodes_network(ctx) && is_root() && has_kubelets_name() && !in_pod() {
        // SAFETY: the helper takes the context that it was called for.
        let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
        let _probe_fails_if_full = KUBELET_SOCKETS.insert(cookie, 1, 0);
    }
}

/// Files the flow of a socket that was noted, for as long as the socket is open.
#[inline(always)]
pub(crate) fn observe(ctx: &SockOpsContext) {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => {
            // SAFETY: the helper takes the context that it was called for.
            let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
            // SAFETY: only the entry's presence is looked at. To look takes no lock, as to remove does, and most sockets are not the kubelet's.
            let noted = unsafe { KUBELET_SOCKETS.get(cookie) }.is_some() && KUBELET_SOCKETS.remove(cookie).is_ok();
            if noted && KUBELET_FLOWS.insert(sock_ops::flow(ctx), 1, 0).is_ok() {
                let _filed_until_evicted = ctx.set_cb_flags(BPF_SOCK_OPS_STATE_CB_FLAG as i32);
            }
        }
        BPF_SOCK_OPS_STATE_CB => {
            if ctx.arg(1) == BPF_TCP_CLOSE {
                let flow = sock_ops::flow(ctx);
                // SAFETY: as above.
                if unsafe { KUBELET_FLOWS.get(&flow) }.is_some() {
                    let _gone_already = KUBELET_FLOWS.remove(&flow);
                }
            }
        }
        _ => {}
    }
}

#[inline(always)]
fn in_nodes_network(ctx: &SockAddrContext) -> bool {
    // SAFETY: the helper takes the context that it was called for.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    SETTINGS.get(0).is_some_and(|settings| {
        let [first, second] = settings.host_cookies;
        cookie == first || cookie == second
    })
}

#[inline(always)]
fn is_root() -> bool {
    bpf_get_current_uid_gid() as u32 == 0
}

#[inline(always)]
fn has_kubelets_name() -> bool {
    // SAFETY: only the entry's presence is looked at.
    bpf_get_current_comm().is_ok_and(|name| unsafe { KUBELET_NAMES.get(name) }.is_some())
}

/// Whether the calling process is a pod's, by its own place and those above it.
#[inline(always)]
fn in_pod() -> bool {
    // SAFETY: a read of this program's own read-only data; volatile, because the loader has set it.
    let pods = unsafe { core::ptr::read_volatile(&raw const PODS_CGROUP) };
    for level in 0..LEVELS {
        // SAFETY: the helper takes a plain number.
        let cgroup = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if cgroup == 0 {
            return pods == 0;
        }
        if cgroup == pods {
            return true;
        }
    }
    true
}
