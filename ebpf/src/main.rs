//! Culvert's eBPF programs: which connections the agent carries, and which reach a pod.
//!
//! Entry points only, one for each hook. What a hook decides is in the module of its name; every decision is an
//! [`Outcome`](culvert_ebpf_common::Outcome), counted and turned into the kernel's return code in `outcome.rs`.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]
#![cfg_attr(
    target_arch = "bpf",
    expect(unsafe_code, reason = "contexts and helpers of the kernel are raw pointers and calls; the verifier checks their use")
)]

#[cfg(target_arch = "bpf")]
mod connect;
#[cfg(target_arch = "bpf")]
mod getpeername;
#[cfg(target_arch = "bpf")]
mod kubelet;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod note;
#[cfg(target_arch = "bpf")]
mod outcome;
#[cfg(target_arch = "bpf")]
mod same_node;
#[cfg(target_arch = "bpf")]
mod sk_lookup;
#[cfg(target_arch = "bpf")]
mod sock_ops;

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::macros::{cgroup_sock_addr, sk_lookup, sock_ops};
    use aya_ebpf::programs::{SkLookupContext, SockAddrContext, SockOpsContext};

    use crate::{connect, getpeername, kubelet, outcome, sk_lookup, sock_ops};

    #[cgroup_sock_addr(connect4)]
    pub(crate) fn connect4(ctx: SockAddrContext) -> i32 {
        outcome::of_connect(connect::over_ipv4(&ctx))
    }

    #[cgroup_sock_addr(connect6)]
    pub(crate) fn connect6(ctx: SockAddrContext) -> i32 {
        outcome::of_connect(connect::over_ipv6(&ctx))
    }

    #[cgroup_sock_addr(getpeername4)]
    pub(crate) fn getpeername4(ctx: SockAddrContext) -> i32 {
        getpeername::over_ipv4(&ctx);
        outcome::ALLOW
    }

    #[cgroup_sock_addr(getpeername6)]
    pub(crate) fn getpeername6(ctx: SockAddrContext) -> i32 {
        getpeername::over_ipv6(&ctx);
        outcome::ALLOW
    }

    #[sock_ops]
    pub(crate) fn sock_ops(ctx: SockOpsContext) -> u32 {
        sock_ops::observe(&ctx);
        1
    }

    #[cgroup_sock_addr(connect4)]
    pub(crate) fn kubelet_connect4(ctx: SockAddrContext) -> i32 {
        kubelet::note(&ctx);
        outcome::ALLOW
    }

    #[cgroup_sock_addr(connect6)]
    pub(crate) fn kubelet_connect6(ctx: SockAddrContext) -> i32 {
        kubelet::note(&ctx);
        outcome::ALLOW
    }

    #[sock_ops]
    pub(crate) fn kubelet_sock_ops(ctx: SockOpsContext) -> u32 {
        kubelet::observe(&ctx);
        1
    }

    #[sk_lookup]
    pub(crate) fn socket_lookup(ctx: SkLookupContext) -> u32 {
        outcome::of_lookup(sk_lookup::admit(&ctx))
    }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// `bpf_set_retval` and its kin are helpers for programs under a licence that the kernel takes for compatible with its own.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(target_arch = "bpf"))]
fn main() {
    eprintln!("these are eBPF programs for the target bpfel-unknown-none; `cargo xtask build` builds them into the agent");
    std::process::exit(1);
}
