//! Network namespaces: what one is known by, and running code inside of it.
//!
//! Enters: an open file of a namespace. Leaves: its inode and cookie, its addresses, and sockets that live in it. A thread that
//! has entered a namespace always comes back, or the process ends: a thread of the runtime in the wrong namespace would send one
//! pod's bytes from another.
#![expect(unsafe_code, reason = "socket options and file system types that no safe interface reads")]

use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use netlink_packet_core::{NLM_F_DUMP, Parseable as _};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_sys::Socket;
use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Protocol, Type};

use super::netlink;

/// The socket mark of the agent's connections to applications (`SO_MARK`). In an enrolled pod's namespace packets that carry it are
/// routed by the table [`DELIVERY_TABLE`], which delivers them locally: so replies to a client's own address come back to the
/// agent. Chosen to stay clear of the marks of kube-proxy (0x4000, 0x8000), Cilium (0xf00), Calico (0xffff0000) and Istio (0x539).
pub const DELIVERY_MARK: u32 = 0x0cf1_0001;

/// The routing table of [`DELIVERY_MARK`], in each enrolled pod's namespace.
pub const DELIVERY_TABLE: u32 = 15008;

/// The mark of the agent's listeners in pods, which the connections that they accept inherit. No route depends on it; it tells the
/// agent's sockets from the application's.
pub(super) const LISTENER_MARK: u32 = 0x0cf1_0002;

const BACKLOG: i32 = 4096;
const SO_NETNS_COOKIE: i32 = 71;
const NSFS_MAGIC: u64 = 0x6e73_6673;
const RTM_NEWADDR: u16 = 20;

/// A network namespace, kept alive.
#[derive(Clone, Debug)]
pub struct Netns {
    fd: Arc<OwnedFd>,
    inode: u64,
    cookie: u64,
}

impl Netns {
    /// Opens the namespace that is mounted at, or linked from, `path`. None when the file is no namespace (yet).
    ///
    /// # Errors
    /// When the file cannot be opened, or the namespace cannot be entered.
    pub fn open(path: &Path) -> io::Result<Option<Self>> {
        let file = File::open(path)?;
        if !is_namespace(&file)? {
            return Ok(None);
        }
        let inode = file.metadata()?.ino();
        // What is kept open must not be the mount: nobody could unmount a namespace that the agent knows.
        let (own, cookie) = enter(file.as_fd(), || Ok((File::open(CURRENT)?, cookie_here()?)))?;
        Ok(Some(Self { fd: Arc::new(own.into()), inode, cookie }))
    }

    /// The calling thread's own namespace.
    ///
    /// # Errors
    /// When `/proc` is not mounted, or the kernel is older than 5.14.
    pub fn current() -> io::Result<Self> {
        let file = File::open(CURRENT)?;
        Ok(Self { inode: file.metadata()?.ino(), fd: Arc::new(file.into()), cookie: cookie_here()? })
    }

    /// The inode in the namespace file system: unique among the namespaces that live.
    #[must_use]
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// The kernel's cookie: never used again until the machine starts anew.
    #[must_use]
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// Runs `f` on this thread inside the namespace. `f` must not hand work to other threads, which are not in it, nor enter another.
    ///
    /// # Errors
    /// That of `f`, or that the namespace could not be entered. A process that cannot come back is aborted.
    pub fn enter<T>(&self, f: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        enter(self.fd.as_fd(), f)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

const CURRENT: &str = "/proc/thread-self/ns/net";

/// Where a thread comes back to is found out once: it never is anywhere else for long.
fn enter<T>(namespace: BorrowedFd<'_>, f: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    struct Home(Rc<File>);
    impl Drop for Home {
        fn drop(&mut self) {
            if let Err(error) = setns(&*self.0, CloneFlags::CLONE_NEWNET) {
                tracing::error!(%error, "cannot come back from a pod's network namespace: stopping");
                std::process::abort();
            }
        }
    }
    thread_local! {
        static HOME: OnceCell<Rc<File>> = const { OnceCell::new() };
    }
    let home = HOME.with(|home| match home.get() {
        Some(home) => Ok(Rc::clone(home)),
        None => File::open(CURRENT).map(|file| Rc::clone(home.get_or_init(|| Rc::new(file)))),
    });
    let home = Home(home?);
    setns(namespace, CloneFlags::CLONE_NEWNET)?;
    let result = f();
    drop(home);
    result
}

/// The cookie of the namespace that the calling thread is in.
fn cookie_here() -> io::Result<u64> {
    let socket = socket2::Socket::new(Domain::UNIX, Type::DGRAM, None)?;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, the size of `cookie`, to it.
    let failed = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_NETNS_COOKIE, (&raw mut cookie).cast(), &raw mut length)
    };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(cookie)
}

/// Whether an open file is a namespace.
pub(super) fn is_namespace(file: &File) -> io::Result<bool> {
    Ok(file_system(file)? == NSFS_MAGIC)
}

/// The magic number of the file system that an open file is on.
pub(super) fn file_system(file: &File) -> io::Result<u64> {
    // SAFETY: all-zero bytes are a value of this structure of integers.
    let mut status: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, and the kernel writes one `statfs`.
    let failed = unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut status) };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(status.f_type as u64)
}

/// Two sockets in a namespace: one tells of changes of addresses, the other reads them.
pub(super) struct AddressWatch {
    changes: Socket,
    queries: Socket,
}

impl AddressWatch {
    /// Opens the sockets in the calling thread's namespace.
    pub(super) fn open_here() -> io::Result<Self> {
        let changes = netlink::open(netlink_sys::protocols::NETLINK_ROUTE)?;
        changes.add_membership(libc::RTNLGRP_IPV4_IFADDR)?;
        changes.add_membership(libc::RTNLGRP_IPV6_IFADDR)?;
        changes.set_non_blocking(true)?;
        Ok(Self { changes, queries: netlink::open(netlink_sys::protocols::NETLINK_ROUTE)? })
    }

    /// The addresses now, without loopback and link-local ones.
    pub(super) fn addresses(&self) -> io::Result<BTreeSet<IpAddr>> {
        let mut addresses = BTreeSet::new();
        let request = netlink::encode(RouteNetlinkMessage::GetAddress(AddressMessage::default()), NLM_F_DUMP);
        netlink::exchange(&self.queries, &request, |kind, payload| {
            if kind == RTM_NEWADDR
                && let Ok(message) = AddressMessage::parse(payload)
            {
                addresses.extend(local_address(&message).filter(|address| is_pod_address(*address)));
            }
        })?;
        Ok(addresses)
    }

    /// Takes what has been told of changes; what it says is in [`addresses`](Self::addresses). An overflow is a change too.
    pub(super) fn drain(&self) {
        while self.changes.recv_from_full().is_ok() {}
    }
}

impl std::os::fd::AsRawFd for AddressWatch {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.changes.as_raw_fd()
    }
}

/// The interface's own address; on a point-to-point link `Address` would be the far end's.
fn local_address(message: &AddressMessage) -> Option<IpAddr> {
    let mut address = None;
    for attribute in &message.attributes {
        if let AddressAttribute::Local(local) = attribute {
            return Some(*local);
        }
        if let AddressAttribute::Address(own) = attribute {
            address = Some(*own);
        }
    }
    address
}

/// Whether an address can be a pod's: neither loopback, link-local, multicast nor unspecified.
fn is_pod_address(address: IpAddr) -> bool {
    if address.is_loopback() || address.is_unspecified() || address.is_multicast() {
        return false;
    }
    match address {
        IpAddr::V4(ip) => !ip.is_link_local(),
        IpAddr::V6(ip) => !ip.is_unicast_link_local(),
    }
}

/// Makes a listening socket in the calling thread's namespace, on loopback and a port that the kernel chooses. It is reached by what
/// `sk_lookup` steers to it, whatever its own address: so the application may use any port itself.
pub(super) fn listen_here(v4: bool) -> io::Result<TcpListener> {
    let (domain, loopback) = if v4 {
        (Domain::IPV4, SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))
    } else {
        (Domain::IPV6, SocketAddr::from((Ipv6Addr::LOCALHOST, 0)))
    };
    let socket = socket2::Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    // The namespace's loopback interface may lack the address: the pod may have turned IPv6 off there.
    if v4 {
        socket.set_freebind_v4(true)?;
    } else {
        socket.set_only_v6(true)?;
        socket.set_freebind_v6(true)?;
    }
    socket.set_mark(LISTENER_MARK)?;
    socket.bind(&loopback.into())?;
    // Accepted connections inherit it, and keep the port that they were dialled on from nobody: an application may listen on it.
    socket.set_reuse_address(true)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_routable_unicast_addresses_can_be_a_pods() {
        for (text, can) in [
            ("10.0.0.1", true),
            ("fd00::1", true),
            ("127.0.0.1", false),
            ("::1", false),
            ("169.254.1.1", false),
            ("fe80::1", false),
            ("224.0.0.1", false),
            ("0.0.0.0", false),
        ] {
            assert_eq!(is_pod_address(text.parse().expect("an address")), can, "{text}");
        }
    }

    #[test]
    fn a_file_that_is_no_namespace_is_not_opened_as_one() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        assert!(Netns::open(file.path()).expect("readable").is_none());
    }

    #[test]
    fn the_current_namespace_has_a_cookie() {
        assert_ne!(Netns::current().expect("the namespace").cookie(), 0);
    }
}
