//! What passes between the nodes: a packet socket on the port of the fabric that leads to the first node, and the TCP streams put
//! together again from what it saw.

use std::collections::BTreeMap;
use std::io::IoSliceMut;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::sockopt::{RcvBufForce, ReceiveTimeout, ReceiveTimestampns};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvmsg, setsockopt, socket,
};
use nix::sys::time::TimeVal;

use crate::netns;

/// How much of each direction of a stream is kept.
const KEPT: usize = 256 * 1024;
const LOOK: Duration = Duration::from_millis(10);

/// One direction of a TCP connection.
#[derive(Clone, Debug, Default)]
pub(crate) struct Direction {
    /// When the SYN passed, since 1970.
    pub(crate) opened: Option<Duration>,
    first: Option<u32>,
    /// By their offset in the stream, with the time when each passed.
    segments: BTreeMap<u32, (Duration, Vec<u8>)>,
    /// Bytes of payload that passed, repeated ones included.
    pub(crate) bytes: u64,
}

/// By who sends and who receives.
pub(crate) type Streams = BTreeMap<(SocketAddrV4, SocketAddrV4), Direction>;

/// A capture that goes on until the program ends.
#[derive(Debug)]
pub(crate) struct Wire {
    streams: Arc<Mutex<Streams>>,
    /// How often there was nothing to read.
    pauses: Arc<AtomicU64>,
}

impl Wire {
    /// Captures what passes an interface of a namespace.
    pub(crate) fn tap(namespace: &str, interface: &str) -> Result<Self> {
        let (socket, index) = netns::inside(namespace, || {
            let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
                .context("opening a packet socket")?;
            Ok((socket, if_nametoindex(interface).with_context(|| format!("looking for {interface}"))?))
        })?;
        setsockopt(&socket, RcvBufForce, &(64 << 20)).context("a large buffer for captured packets")?;
        setsockopt(&socket, ReceiveTimestampns, &true).context("timestamps of captured packets")?;
        setsockopt(&socket, ReceiveTimeout, &TimeVal::new(0, 10_000)).context("a timeout for captured packets")?;
        let wire = Self { streams: Arc::default(), pauses: Arc::default() };
        let (streams, pauses) = (Arc::clone(&wire.streams), Arc::clone(&wire.pauses));
        std::thread::spawn(move || capture(&socket, index as usize, &streams, &pauses));
        Ok(wire)
    }

    /// The streams of all that has passed until now. A packet is in the socket before its receiver can act on it.
    pub(crate) fn streams(&self) -> Streams {
        let before = self.pauses.load(Ordering::SeqCst);
        while self.pauses.load(Ordering::SeqCst) < before + 2 {
            sleep(LOOK);
        }
        lock(&self.streams).clone()
    }
}

impl Direction {
    /// The bytes from the start of the stream to the first gap, or to the end of what is kept.
    pub(crate) fn text(&self) -> Vec<u8> {
        let mut text = Vec::new();
        for (offset, (_, bytes)) in &self.segments {
            let offset = *offset as usize;
            if offset > text.len() {
                break;
            }
            if offset + bytes.len() > text.len() {
                text.extend_from_slice(&bytes[text.len() - offset..]);
            }
        }
        text
    }

    /// When the byte at an offset passed.
    pub(crate) fn time_of(&self, offset: usize) -> Option<Duration> {
        let (start, (time, bytes)) = self.segments.range(..=u32::try_from(offset).ok()?).next_back()?;
        (offset < *start as usize + bytes.len()).then_some(*time)
    }

    /// Whether a text passed as it is.
    pub(crate) fn shows(&self, text: &str) -> bool {
        self.text().windows(text.len()).any(|window| window == text.as_bytes())
    }

    fn add(&mut self, segment: &Segment<'_>, time: Duration) {
        if segment.syn {
            self.opened = self.opened.or(Some(time));
            self.first = Some(segment.sequence.wrapping_add(1));
        }
        self.bytes += segment.payload.len() as u64;
        let Some(first) = self.first else { return };
        let offset = segment.sequence.wrapping_sub(first);
        if !segment.payload.is_empty() && (offset as usize) < KEPT {
            self.segments.entry(offset).or_insert_with(|| (time, segment.payload.to_vec()));
        }
    }
}

/// A TCP segment over IPv4.
struct Segment<'a> {
    source: SocketAddrV4,
    destination: SocketAddrV4,
    sequence: u32,
    syn: bool,
    payload: &'a [u8],
}

impl<'a> Segment<'a> {
    /// Reads an Ethernet frame; anything else but TCP over IPv4 is none.
    fn read(frame: &'a [u8]) -> Option<Self> {
        let packet = frame.get(14..)?;
        if frame.get(12..14)? != [8, 0] || *packet.get(9)? != 6 {
            return None;
        }
        let header = usize::from(packet.first()? & 15) * 4;
        let total = usize::from(u16::from_be_bytes(*packet.get(2..4)?.first_chunk()?));
        // Segments that the kernel has not cut yet may be longer than the field can say.
        let packet = if total == 0 { packet } else { packet.get(..total)? };
        let segment = packet.get(header..)?;
        let address = |at: usize| Some(Ipv4Addr::from(*packet.get(at..at + 4)?.first_chunk::<4>()?));
        let port = |at: usize| Some(u16::from_be_bytes(*segment.get(at..at + 2)?.first_chunk()?));
        Some(Self {
            source: SocketAddrV4::new(address(12)?, port(0)?),
            destination: SocketAddrV4::new(address(16)?, port(2)?),
            sequence: u32::from_be_bytes(*segment.get(4..8)?.first_chunk()?),
            syn: segment.get(13)? & 2 != 0,
            payload: segment.get(usize::from(segment.get(12)? >> 4) * 4..)?,
        })
    }
}

fn capture(socket: &OwnedFd, interface: usize, streams: &Mutex<Streams>, pauses: &AtomicU64) {
    let mut buffer = vec![0; 256 * 1024];
    let mut control = nix::cmsg_space!(nix::sys::time::TimeSpec);
    loop {
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let (length, time) = match recvmsg::<LinkAddr>(socket.as_raw_fd(), &mut slices, Some(&mut control), MsgFlags::empty()) {
            Ok(message) if message.address.is_some_and(|address| address.ifindex() == interface) => {
                let time = message.cmsgs().into_iter().flatten().find_map(|message| {
                    let ControlMessageOwned::ScmTimestampns(time) = message else { return None };
                    Some(Duration::from(time))
                });
                (message.bytes, time.unwrap_or_default())
            }
            Ok(_elsewhere) => continue,
            Err(Errno::EAGAIN | Errno::EINTR) => {
                pauses.fetch_add(1, Ordering::SeqCst);
                continue;
            }
            Err(_gone) => return,
        };
        if let Some(segment) = Segment::read(&buffer[..length]) {
            lock(streams).entry((segment.source, segment.destination)).or_default().add(&segment, time);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
