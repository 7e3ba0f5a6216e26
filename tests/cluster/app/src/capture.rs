//! Every frame that passes the links of the network namespace, but for its loopback, kept and asked about: each line that comes is a question in JSON, each line
//! that goes is its answer. The end of the questions is the end.

use std::collections::BTreeMap;
use std::io::{BufRead as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::net::if_::{if_indextoname, if_nametoindex};
use nix::sys::socket::sockopt::{RcvBufForce, ReceiveTimeout};
use nix::sys::socket::{AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket};
use nix::sys::time::TimeVal;
use serde_json::{Value, json};

const LOOK: Duration = Duration::from_millis(10);
/// So many bytes of what is said first are told.
const SHOWN: usize = 24;
/// No more than this is kept, in bytes.
const KEPT: usize = 512 << 20;

struct Frame {
    interface: usize,
    bytes: Vec<u8>,
}

/// Captures until the questions end.
pub(crate) fn run() -> Result<()> {
    let socket =
        socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll).context("a packet socket")?;
    setsockopt(&socket, RcvBufForce, &(64 << 20)).context("a large buffer")?;
    setsockopt(&socket, ReceiveTimeout, &TimeVal::new(0, 10_000)).context("a timeout")?;
    // Through the node's loopback passes what its kubelet and its runtime tell each other, these questions among it.
    let loopback = if_nametoindex("lo").context("looking for the loopback")? as usize;
    let (frames, pauses) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicU64::new(0)));
    let (kept, paused) = (Arc::clone(&frames), Arc::clone(&pauses));
    std::thread::spawn(move || {
        let (mut buffer, mut total) = (vec![0; 1 << 17], 0);
        loop {
            match recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer) {
                Ok((_, Some(from))) if from.ifindex() == loopback => {}
                Ok((length, from)) if total + length <= KEPT => {
                    total += length;
                    let interface = from.map_or(0, |from| from.ifindex());
                    kept.lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(Frame { interface, bytes: buffer[..length].to_vec() });
                }
                Ok(_too_much) => {}
                Err(Errno::EAGAIN | Errno::EINTR) => drop(paused.fetch_add(1, Ordering::SeqCst)),
                Err(error) => return eprintln!("capture: {error}"),
            }
        }
    });
    let mut out = std::io::stdout();
    writeln!(out, "capturing")?;
    for line in std::io::stdin().lock().lines() {
        let question: Value = serde_json::from_str(&line?)?;
        // All that was sent before the question has been seen when the socket has been empty.
        let before = pauses.load(Ordering::SeqCst);
        while pauses.load(Ordering::SeqCst) < before + 2 {
            std::thread::sleep(LOOK);
        }
        writeln!(out, "{}", answer(&question, &frames.lock().unwrap_or_else(PoisonError::into_inner)))?;
    }
    Ok(())
}

fn answer(question: &Value, frames: &[Frame]) -> Value {
    if let Some(text) = question["find"].as_str() {
        let shows = |frame: &&Frame| frame.bytes.windows(text.len()).any(|window| window == text.as_bytes());
        return json!({"frames": frames.iter().filter(shows).count()});
    }
    let (mut order, mut flows) = (Vec::new(), BTreeMap::new());
    for frame in frames {
        let Some((source, destination, payload)) = segment(&frame.bytes) else { continue };
        let key = (frame.interface, source, destination);
        if !payload.is_empty() && !flows.contains_key(&key) {
            flows.insert(key, &payload[..payload.len().min(SHOWN)]);
            order.push(key);
        }
    }
    let told = order.into_iter().map(|key| {
        let (interface, source, destination) = key;
        let interface = if_indextoname(u32::try_from(interface).unwrap_or_default()).ok();
        let interface = interface.and_then(|name| name.into_string().ok()).unwrap_or_default();
        let first = flows[&key];
        // A record of a handshake, of any version.
        let tls = first.starts_with(&[22, 3]);
        json!({"interface": interface, "source": source, "destination": destination, "tls": tls, "first": first})
    });
    told.collect()
}

/// A TCP segment in an Ethernet frame: who sends, who receives, and what is said.
fn segment(frame: &[u8]) -> Option<(SocketAddr, SocketAddr, &[u8])> {
    let packet = frame.get(14..)?;
    let (source, destination, segment): (IpAddr, IpAddr, &[u8]) = match frame.get(12..14)? {
        [8, 0] if *packet.get(9)? == 6 => {
            let total = usize::from(u16::from_be_bytes(*packet.get(2..4)?.first_chunk()?));
            let header = usize::from(packet.first()? & 15) * 4;
            let address = |at: usize| Some(Ipv4Addr::from(*packet.get(at..)?.first_chunk::<4>()?));
            // Segments that the kernel has not cut yet may be longer than the field can say.
            let packet = if total == 0 { packet } else { packet.get(..total)? };
            (address(12)?.into(), address(16)?.into(), packet.get(header..)?)
        }
        [0x86, 0xdd] if *packet.get(6)? == 6 => {
            let address = |at: usize| Some(Ipv6Addr::from(*packet.get(at..)?.first_chunk::<16>()?));
            (address(8)?.into(), address(24)?.into(), packet.get(40..)?)
        }
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes(*segment.get(at..)?.first_chunk()?));
    let payload = segment.get(usize::from(segment.get(12)? >> 4) * 4..)?;
    Some((SocketAddr::new(source, port(0)?), SocketAddr::new(destination, port(2)?), payload))
}
