//! To the pod's own application, with the client's own address as source.
//!
//! The socket is transparent, so that it may be bound to an address that is not the pod's, and marked, so that the pod's routing
//! brings the replies back to it (see `capture::netns`).
#![expect(unsafe_code, reason = "two socket options have no safe wrapper")]

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;

use socket2::Socket;
use tokio::net::TcpStream;

use super::{DeliverError, connect_socket};

/// Connects `socket`, made in the pod's namespace, to `destination`, an address of the pod's, from `source`. The pod itself as client
/// leaves the source to the kernel, and the port 0 the port; a client of another family than the destination is refused by it.
///
/// # Errors
/// [`DeliverError::Refused`] when the application does not listen; [`DeliverError::Unreachable`]; [`DeliverError::Socket`], also when
/// another connection to `destination` has that source.
pub async fn connect(socket: Socket, source: SocketAddr, destination: SocketAddr, mark: u32) -> Result<TcpStream, DeliverError> {
    if source.ip() != destination.ip() {
        bind_as(&socket, source, mark).map_err(|source| DeliverError::Socket { destination, source })?;
    }
    connect_socket(socket, destination).await
}

fn bind_as(socket: &Socket, source: SocketAddr, mark: u32) -> io::Result<()> {
    socket.set_mark(mark)?;
    // Said so, the kernel chooses the port of a connection in TIME_WAIT again within the pod (`tcp_tw_reuse` 2, the default): a client that
    // closes first would run out of them after 28,000 connections a minute.
    socket.bind_device(Some(b"lo"))?;
    if source.is_ipv4() {
        socket.set_ip_transparent_v4(true)?;
    } else {
        set(socket, libc::SOL_IPV6, libc::IPV6_TRANSPARENT)?;
    }
    if source.port() == 0 {
        // Otherwise bind() itself searches for a port that is free towards every destination, ever longer as connections in TIME_WAIT
        // pile up.
        set(socket, libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT)?;
    } else {
        // Others with the same source, to other destinations or in TIME_WAIT, are not in the way.
        socket.set_reuse_address(true)?;
    }
    socket.bind(&source.into())
}

/// Switches a socket option on.
fn set(socket: &Socket, level: libc::c_int, option: libc::c_int) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the pointer is to an int of this frame, and its size is given; the descriptor is open while `socket` is borrowed.
    let answer = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const on).cast(), size_of_val(&on) as u32) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
