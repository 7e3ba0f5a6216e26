//! One request over netlink and its answer, synchronously.
//!
//! Enters: a socket of the network namespace that is meant, and a message. Leaves: the payloads of the answer. The kernel answers
//! within the system call that asks, so nothing here waits.

use std::io;

use netlink_packet_core::{NLM_F_REQUEST, NetlinkMessage};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr};

const HEADER: usize = 16;
const NLMSG_NOOP: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_OVERRUN: u16 = 4;

/// Opens a socket to the kernel in the calling thread's network namespace.
///
/// # Errors
/// When the kernel has no such protocol or no room.
pub(super) fn open(protocol: isize) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

/// The bytes of a route message. `flags` are in addition to `NLM_F_REQUEST`.
pub(super) fn encode(message: RouteNetlinkMessage, flags: u16) -> Vec<u8> {
    let mut message = NetlinkMessage::from(message);
    message.header.flags = NLM_F_REQUEST | flags;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// Sends `request`, which must ask for an acknowledgement or a dump, and hands each message of the answer to `each` by type and
/// payload.
///
/// # Errors
/// What the kernel answers, or that the socket failed; the socket is then of no further use.
pub(super) fn exchange(socket: &Socket, request: &[u8], mut each: impl FnMut(u16, &[u8])) -> io::Result<()> {
    socket.send(request, 0)?;
    loop {
        let (answer, _kernel) = socket.recv_from_full()?;
        if answer.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if for_each(&answer, &mut each)? {
            return Ok(());
        }
    }
}

/// Walks one datagram; true when it ends the answer.
fn for_each(mut rest: &[u8], each: &mut impl FnMut(u16, &[u8])) -> io::Result<bool> {
    while let Some((kind, payload, after)) = split(rest) {
        match kind {
            NLMSG_DONE | NLMSG_ERROR => {
                let code = payload.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                return if code == 0 { Ok(true) } else { Err(io::Error::from_raw_os_error(code.wrapping_neg())) };
            }
            NLMSG_OVERRUN => return Err(io::Error::from_raw_os_error(libc::ENOBUFS)),
            NLMSG_NOOP => {}
            _ => each(kind, payload),
        }
        rest = after;
    }
    Ok(false)
}

/// The first message's type and payload, and what follows it; none when what is left is no whole message.
fn split(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let payload = bytes.get(HEADER..length)?;
    let aligned = length.next_multiple_of(4).min(bytes.len());
    Some((kind, payload, &bytes[aligned..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = ((HEADER + payload.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn an_answer_ends_with_done_and_gives_what_came_before() {
        let mut bytes = message(20, b"abc");
        bytes.extend(message(NLMSG_NOOP, b""));
        bytes.extend(message(NLMSG_DONE, &0_i32.to_ne_bytes()));
        let mut seen = Vec::new();
        assert!(for_each(&bytes, &mut |kind, payload: &[u8]| seen.push((kind, payload.to_vec()))).expect("a whole answer"));
        assert_eq!(seen, [(20, b"abc".to_vec())]);
    }

    #[test]
    fn a_refusal_is_the_kernels_error() {
        let bytes = message(NLMSG_ERROR, &(-libc::EEXIST).to_ne_bytes());
        let error = for_each(&bytes, &mut |_, _: &[u8]| ()).expect_err("an error");
        assert_eq!(error.raw_os_error(), Some(libc::EEXIST));
    }

    #[test]
    fn lengths_that_lie_end_the_walk() {
        for length in [0_u32, 15, 17, u32::MAX] {
            let mut bytes = message(20, b"");
            bytes[..4].copy_from_slice(&length.to_ne_bytes());
            assert!(!for_each(&bytes, &mut |_, _: &[u8]| panic!("no message")).expect("no answer"));
        }
    }
}
