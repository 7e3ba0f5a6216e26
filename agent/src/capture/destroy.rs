//! Ends connections to a pod's application that the agent does not carry.
//!
//! Plaintext that the mode lets through stays in the kernel; when a mode or a policy changes, what is open and now denied is ended
//! with the kernel's socket diagnosis (`sock_diag(7)`): both ends see a reset. Enters: a namespace and a judge. Leaves: how many
//! connections ended. Never touched: the agent's own sockets, its deliveries, and connections within the pod.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use culvert_ebpf_common::HBONE_PORT;
use netlink_sys::Socket;

use super::netlink;
use super::netns::{DELIVERY_MARK, LISTENER_MARK, Netns};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const INET_DIAG_MARK: u16 = 15;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const AF_INET: u8 = libc::AF_INET as u8;
const AF_INET6: u8 = libc::AF_INET6 as u8;

const ESTABLISHED: u8 = 1;
/// Admitted, and not answered yet: nothing would judge it again when it is.
const SYN_RECEIVED: u8 = 3;
const FIN_WAIT1: u8 = 4;
const FIN_WAIT2: u8 = 5;
const CLOSE_WAIT: u8 = 8;
const LISTEN: u8 = 10;
const STATES: u32 = 1 << ESTABLISHED | 1 << SYN_RECEIVED | 1 << FIN_WAIT1 | 1 << FIN_WAIT2 | 1 << CLOSE_WAIT | 1 << LISTEN;

/// `struct inet_diag_sockid`: ports, addresses, interface, cookie.
const ID_LENGTH: usize = 48;
/// `struct inet_diag_msg` before its attributes.
const MESSAGE_LENGTH: usize = 72;

/// A socket as the kernel lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Listed {
    family: u8,
    state: u8,
    local: SocketAddr,
    remote: SocketAddr,
    mark: u32,
    /// The kernel's `inet_diag_sockid`, by which it is destroyed.
    id: [u8; ID_LENGTH],
}

/// Ends the connections to the applications of the pod in `netns` of which `denied` says so, given source and destination (neither
/// is IPv4-mapped). Gives how many ended. Blocks for as long as the kernel lists the sockets: call it from a thread that may.
///
/// # Errors
/// When the namespace cannot be entered, or the kernel lacks `CONFIG_INET_DIAG` or, where there is something to end,
/// `CONFIG_INET_DIAG_DESTROY`. All that could be ended have ended.
pub fn destroy_inbound(netns: &Netns, denied: impl Fn(SocketAddr, SocketAddr) -> bool) -> io::Result<usize> {
    let socket = netns.enter(|| netlink::open(netlink_sys::protocols::NETLINK_SOCK_DIAG))?;
    let mut listed = Vec::new();
    for family in [AF_INET, AF_INET6] {
        let request = request(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, family, STATES, &[0; ID_LENGTH]);
        netlink::exchange(&socket, &request, |_, payload| listed.extend(parse(payload)))?;
    }
    let (mut ended, mut failed) = (0, None);
    for connection in inbound(&listed).filter(|connection| denied(connection.remote, connection.local)) {
        match destroy(&socket, connection) {
            Ok(destroyed) => ended += usize::from(destroyed),
            // One that does not go is no reason to spare the others.
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    failed.map_or(Ok(ended), Err)
}

/// The connections that applications accepted from outside of the pod and that are none of the agent's.
fn inbound(listed: &[Listed]) -> impl Iterator<Item = &Listed> {
    let ports: HashSet<u16> = listed
        .iter()
        .filter(|socket| socket.state == LISTEN && socket.mark != LISTENER_MARK)
        .map(|socket| socket.local.port())
        .collect();
    // A connection of which both ends are in the namespace is the pod's own, or the agent's delivery.
    let ends: HashSet<(SocketAddr, SocketAddr)> = listed.iter().map(|socket| (socket.local, socket.remote)).collect();
    listed.iter().filter(move |socket| {
        socket.state != LISTEN
            && ports.contains(&socket.local.port())
            && socket.local.port() != HBONE_PORT
            && socket.mark != LISTENER_MARK
            && socket.mark != DELIVERY_MARK
            && !ends.contains(&(socket.remote, socket.local))
    })
}

/// False when the connection had ended by itself.
fn destroy(socket: &Socket, connection: &Listed) -> io::Result<bool> {
    let request = request(SOCK_DESTROY, NLM_F_ACK, connection.family, 1 << connection.state, &connection.id);
    match netlink::exchange(socket, &request, |_, _| ()) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// A `struct inet_diag_req_v2` under its netlink header.
fn request(kind: u16, flags: u16, family: u8, states: u32, id: &[u8; ID_LENGTH]) -> Vec<u8> {
    const LENGTH: u32 = 16 + 8 + ID_LENGTH as u32;
    let mut bytes = Vec::with_capacity(LENGTH as usize);
    bytes.extend(LENGTH.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    bytes.extend([0; 8]);
    // No extension is asked for: the mark comes unasked to who may administer the network.
    bytes.extend([family, libc::IPPROTO_TCP as u8, 0, 0]);
    bytes.extend(states.to_ne_bytes());
    bytes.extend(id);
    bytes
}

/// Reads a `struct inet_diag_msg` and the mark among its attributes.
fn parse(payload: &[u8]) -> Option<Listed> {
    let (&[family, state, _timer, _retransmits], rest) = payload.split_first_chunk()?;
    let id: &[u8; ID_LENGTH] = rest.first_chunk()?;
    let port = |at: usize| u16::from_be_bytes([id[at], id[at + 1]]);
    let address = |at: usize| -> Option<IpAddr> {
        Some(match family {
            AF_INET => Ipv4Addr::from(*id[at..].first_chunk::<4>()?).into(),
            AF_INET6 => Ipv6Addr::from(*id[at..].first_chunk::<16>()?).to_canonical(),
            _ => return None,
        })
    };
    Some(Listed {
        family,
        state,
        local: SocketAddr::new(address(4)?, port(0)),
        remote: SocketAddr::new(address(20)?, port(2)),
        mark: mark(payload.get(MESSAGE_LENGTH..)?),
        id: *id,
    })
}

fn mark(mut attributes: &[u8]) -> u32 {
    while let Some((&[l0, l1, k0, k1], _)) = attributes.split_first_chunk() {
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let Some(value) = attributes.get(4..length) else { return 0 };
        if u16::from_ne_bytes([k0, k1]) == INET_DIAG_MARK {
            return value.first_chunk().map_or(0, |mark| u32::from_ne_bytes(*mark));
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket(state: u8, local: &str, remote: &str, mark: u32) -> Listed {
        let parse = |text: &str| text.parse().expect("an address");
        Listed { family: AF_INET, state, local: parse(local), remote: parse(remote), mark, id: [0; ID_LENGTH] }
    }

    #[test]
    fn only_what_the_application_accepted_from_outside_is_inbound() {
        let listed = [
            socket(LISTEN, "0.0.0.0:80", "0.0.0.0:0", 0),
            socket(LISTEN, "0.0.0.0:15008", "0.0.0.0:0", 0),
            socket(LISTEN, "127.0.0.1:40000", "0.0.0.0:0", LISTENER_MARK),
            socket(ESTABLISHED, "10.0.0.1:80", "10.0.0.9:1000", 0),
            // The agent's delivery: the application's end, and the agent's.
            socket(ESTABLISHED, "10.0.0.1:80", "10.0.0.8:1000", DELIVERY_MARK),
            socket(ESTABLISHED, "10.0.0.8:1000", "10.0.0.1:80", DELIVERY_MARK),
            // The pod to itself.
            socket(ESTABLISHED, "10.0.0.1:80", "10.0.0.1:1001", 0),
            socket(ESTABLISHED, "10.0.0.1:1001", "10.0.0.1:80", 0),
            // The application's own call, a tunnel, plaintext that the agent decided on.
            socket(ESTABLISHED, "10.0.0.1:1002", "10.0.0.9:443", 0),
            socket(ESTABLISHED, "10.0.0.1:15008", "10.0.0.9:1003", LISTENER_MARK),
            socket(CLOSE_WAIT, "10.0.0.1:80", "10.0.0.9:1004", LISTENER_MARK),
            socket(CLOSE_WAIT, "10.0.0.1:80", "10.0.0.9:1005", 0),
            socket(SYN_RECEIVED, "10.0.0.1:80", "10.0.0.9:1006", 0),
        ];
        let remotes: Vec<_> = inbound(&listed).map(|socket| socket.remote.port()).collect();
        assert_eq!(remotes, [1000, 1005, 1006]);
    }

    #[test]
    fn a_listed_socket_is_read_with_its_mark() {
        let mut payload = vec![AF_INET6, ESTABLISHED, 0, 0, 0, 80, 3, 232];
        payload.extend("::ffff:10.0.0.1".parse::<Ipv6Addr>().expect("an address").octets());
        payload.extend("fd00::9".parse::<Ipv6Addr>().expect("an address").octets());
        payload.resize(MESSAGE_LENGTH, 7);
        payload.extend([5, 0, 8, 0, 9, 0, 0, 0]);
        payload.extend([8, 0, 15, 0]);
        payload.extend(DELIVERY_MARK.to_ne_bytes());
        let listed = parse(&payload).expect("a socket");
        assert_eq!((listed.local, listed.mark), ("10.0.0.1:80".parse().expect("an address"), DELIVERY_MARK));
        assert_eq!(listed.remote, "[fd00::9]:1000".parse().expect("an address"));
    }

    #[test]
    fn short_or_lying_messages_are_no_sockets() {
        assert_eq!(parse(&[AF_INET; MESSAGE_LENGTH - 1]), None);
        assert_eq!(mark(&[0, 0, 15, 0, 1, 1, 1, 1]), 0);
        assert_eq!(mark(&[200, 0, 15, 0]), 0);
    }
}
