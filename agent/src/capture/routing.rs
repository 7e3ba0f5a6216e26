//! What an enrolled pod's namespace needs so that replies to a client's own address come back to the agent.
//!
//! Three sysctls, one rule and one route a family; nothing else in the namespace changes. The agent's connection to the application
//! carries [`DELIVERY_MARK`] and the client's address; the sysctls give the mark to what answers it, and the rule and the route
//! deliver that to the loopback interface. All is undone when the last user is gone.

use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::link::{LinkFlags, LinkMessage};
use netlink_packet_route::route::{RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::Socket;

use super::netns::{DELIVERY_MARK, DELIVERY_TABLE, Netns};
use super::{cgroup, netlink};

/// The application's socket takes over the mark of the agent's connection; and so does the reset that refuses one where nothing
/// listens, which has no socket.
const SYSCTLS: [&str; 3] =
    ["/proc/sys/net/ipv4/tcp_fwmark_accept", "/proc/sys/net/ipv4/fwmark_reflect", "/proc/sys/net/ipv6/fwmark_reflect"];
/// The loopback device is the first of every namespace (`net/core/dev.c` asserts it).
const LOOPBACK: u32 = 1;
/// Before the main table (32766), after the local one (0).
const RULE_PRIORITY: u32 = 150;

/// The routing of one namespace, shared by all that use it.
#[derive(Clone, Debug, Default)]
pub(super) struct Routing(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    users: usize,
    /// The sysctls that were off before.
    sysctls_set: Vec<&'static str>,
}

/// Keeps a namespace's routing in place. On drop it is undone, on a thread that may block, when no other user is left.
#[derive(Debug)]
pub(super) struct RoutingLease {
    routing: Routing,
    netns: Netns,
    runtime: tokio::runtime::Handle,
}

impl Routing {
    /// Sets the namespace up for the families of `addresses`. Must run inside of the namespace.
    ///
    /// # Errors
    /// The first step that the kernel refused.
    pub(super) fn set_up_here(
        &self,
        netns: &Netns,
        addresses: &[IpAddr],
        runtime: &tokio::runtime::Handle,
    ) -> io::Result<RoutingLease> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let socket = netlink::open(netlink_sys::protocols::NETLINK_ROUTE)?;
        change(&socket, RouteNetlinkMessage::SetLink(loopback_up()), 0)?;
        for family in families(addresses) {
            change(&socket, RouteNetlinkMessage::NewRoute(route(family)), NLM_F_CREATE | NLM_F_EXCL)?;
            change(&socket, RouteNetlinkMessage::NewRule(rule(family)), NLM_F_CREATE | NLM_F_EXCL)?;
        }
        for sysctl in SYSCTLS {
            match std::fs::read(sysctl) {
                Ok(value) if value.first() == Some(&b'0') => {
                    write_sysctl(sysctl, "1")?;
                    state.sysctls_set.push(sysctl);
                }
                // A kernel without IPv6 has no such file.
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        state.users += 1;
        drop(state);
        Ok(RoutingLease { routing: self.clone(), netns: netns.clone(), runtime: runtime.clone() })
    }

    fn release(&self, netns: &Netns) -> io::Result<()> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.users = state.users.saturating_sub(1);
        if state.users > 0 {
            return Ok(());
        }
        netns.enter(|| undo_here(&std::mem::take(&mut state.sysctls_set)))
    }
}

impl Drop for RoutingLease {
    fn drop(&mut self) {
        let (routing, netns) = (self.routing.clone(), self.netns.clone());
        self.runtime.spawn_blocking(move || {
            if let Err(error) = routing.release(&netns) {
                tracing::warn!(%error, netns = netns.inode(), "could not undo the routing of a pod that left the mesh");
            }
        });
    }
}

/// Removes the rules and routes from the calling thread's namespace, and switches `sysctls` off.
///
/// # Errors
/// The first step that failed; the others are done all the same.
pub(super) fn undo_here(sysctls: &[&str]) -> io::Result<()> {
    let socket = netlink::open(netlink_sys::protocols::NETLINK_ROUTE)?;
    let mut result = Ok(());
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        result = result.and(change(&socket, RouteNetlinkMessage::DelRule(rule(family)), 0));
        result = result.and(change(&socket, RouteNetlinkMessage::DelRoute(route(family)), 0));
    }
    for sysctl in sysctls {
        // A kernel without IPv6 has no such file.
        result = result.and(match write_sysctl(sysctl, "0") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            written => written,
        });
    }
    result
}

/// Takes out of the calling thread's namespace whatever an agent set up there, of which nobody is left to say what was before: where the
/// rule is found the sysctls go back to the kernel's own default.
///
/// # Errors
/// The first step that failed; the others are done all the same.
pub(super) fn leave_here() -> io::Result<()> {
    let socket = netlink::open(netlink_sys::protocols::NETLINK_ROUTE)?;
    let removals = [AddressFamily::Inet, AddressFamily::Inet6].map(|family| {
        let removal = netlink::encode(RouteNetlinkMessage::DelRule(rule(family)), NLM_F_ACK);
        netlink::exchange(&socket, &removal, |_, _| ()).is_ok()
    });
    drop(socket);
    undo_here(if removals.contains(&true) { &SYSCTLS } else { &[] })
}

/// Writes a sysctl of the calling thread's namespace. A container that is not privileged has its own `/proc/sys` read-only; the first
/// process's is another mount of the same files, and which namespace they are of is decided by who opens them.
fn write_sysctl(path: &str, value: &str) -> io::Result<()> {
    match std::fs::write(path, value) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            std::fs::write(cgroup::in_init(Path::new(path)), value)
        }
        result => result,
    }
}

/// Applies one change; that it is applied already is no error.
fn change(socket: &Socket, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
    match netlink::exchange(socket, &netlink::encode(message, NLM_F_ACK | flags), |_, _| ()) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EEXIST | libc::ENOENT | libc::ESRCH | libc::EAFNOSUPPORT)) => {
            Ok(())
        }
        result => result,
    }
}

fn families(addresses: &[IpAddr]) -> impl Iterator<Item = AddressFamily> {
    let v4 = addresses.iter().any(IpAddr::is_ipv4).then_some(AddressFamily::Inet);
    let v6 = addresses.iter().any(IpAddr::is_ipv6).then_some(AddressFamily::Inet6);
    v4.into_iter().chain(v6)
}

fn loopback_up() -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = LOOPBACK;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    message
}

/// `ip rule add fwmark DELIVERY_MARK lookup DELIVERY_TABLE`.
fn rule(family: AddressFamily) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family;
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![
        RuleAttribute::Priority(RULE_PRIORITY),
        RuleAttribute::FwMark(DELIVERY_MARK),
        RuleAttribute::FwMask(u32::MAX),
        RuleAttribute::Table(DELIVERY_TABLE),
    ];
    message
}

/// `ip route add local default dev lo table DELIVERY_TABLE`.
fn route(family: AddressFamily) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: family,
        protocol: RouteProtocol::Static,
        scope: if family == AddressFamily::Inet { RouteScope::Host } else { RouteScope::Universe },
        kind: RouteType::Local,
        ..RouteHeader::default()
    };
    message.attributes = vec![RouteAttribute::Table(DELIVERY_TABLE), RouteAttribute::Oif(LOOPBACK)];
    message
}
