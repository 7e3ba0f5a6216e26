//! What the links of a namespace carried: every frame, kept, to be searched.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, setsockopt, socket, sockopt};
use socket2::Socket;

use crate::Namespace;

/// A capture that is running.
#[derive(Debug)]
pub struct Capture {
    frames: Arc<Mutex<Vec<Vec<u8>>>>,
    stop: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
}

impl Capture {
    /// Captures what passes all interfaces of `namespace`, both ways.
    ///
    /// # Panics
    /// When the kernel refuses the socket.
    #[must_use]
    pub fn start(namespace: &Namespace) -> Self {
        let socket = namespace.run(open);
        let (frames, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (kept, stopped) = (Arc::clone(&frames), Arc::clone(&stop));
        let reader = std::thread::spawn(move || {
            let mut frame = vec![0; 1 << 17];
            let mut socket = socket;
            while !stopped.load(Ordering::Relaxed) {
                if let Ok(length) = socket.read(&mut frame) {
                    kept.lock().expect("no panic").push(frame[..length].to_vec());
                }
            }
            // On a busy machine the reader may not have had its turn since: what has passed is in the socket.
            socket.set_nonblocking(true).expect("a socket option");
            while let Ok(length) = socket.read(&mut frame) {
                kept.lock().expect("no panic").push(frame[..length].to_vec());
            }
        });
        Self { frames, stop, reader: Some(reader) }
    }

    /// Whether a frame holds these bytes in plain sight.
    ///
    /// # Panics
    /// Never.
    #[must_use]
    pub fn shows(&self, bytes: &[u8]) -> bool {
        self.frames.lock().expect("no panic").iter().any(|frame| frame.windows(bytes.len()).any(|window| window == bytes))
    }

    /// The ends of each TCP segment that was captured, sender first. A segment shows once at each interface that it passes.
    ///
    /// # Panics
    /// Never.
    #[must_use]
    pub fn segments(&self) -> Vec<(SocketAddr, SocketAddr)> {
        self.frames.lock().expect("no panic").iter().filter_map(|frame| segment(frame)).collect()
    }

    /// The words in plain sight that begin with `prefix` and end with `last`, which is part of them.
    ///
    /// # Panics
    /// Never.
    #[must_use]
    pub fn words(&self, prefix: &str, last: char) -> BTreeSet<String> {
        let frames = self.frames.lock().expect("no panic");
        let texts = frames.iter().map(|frame| String::from_utf8_lossy(frame));
        let mut found = BTreeSet::new();
        for text in texts {
            let words = text.match_indices(prefix).filter_map(|(at, _)| text[at..].split_inclusive(last).next());
            found.extend(words.map(str::to_owned));
        }
        found
    }

    /// Ends the capture, when all that was sent has been seen.
    ///
    /// # Panics
    /// When the reader did.
    pub fn finish(&mut self) {
        std::thread::sleep(Duration::from_millis(20));
        self.stop.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            reader.join().expect("the reader lives");
        }
    }
}

fn open() -> Socket {
    let all = SockProtocol::EthAll;
    let fd = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, all).expect("root may capture");
    let socket = Socket::from(fd);
    socket.set_read_timeout(Some(Duration::from_millis(20))).expect("a socket option");
    // Past the system's limit: a capture that loses frames proves nothing.
    setsockopt(&socket, sockopt::RcvBufForce, &(256 << 20)).expect("root may have more");
    socket
}

/// The ends of the TCP segment in an Ethernet frame. Packets with IPv6 extension headers are none.
fn segment(frame: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
    let (kind, packet) = (frame.get(12..14)?, frame.get(14..)?);
    let (source, destination, tcp): (IpAddr, IpAddr, _) = match kind {
        [8, 0] if packet.get(9) == Some(&6) => (
            Ipv4Addr::from(*packet.get(12..)?.first_chunk::<4>()?).into(),
            Ipv4Addr::from(*packet.get(16..)?.first_chunk::<4>()?).into(),
            packet.get(usize::from(packet[0] & 15) * 4..)?,
        ),
        [0x86, 0xdd] if packet.get(6) == Some(&6) => (
            Ipv6Addr::from(*packet.get(8..)?.first_chunk::<16>()?).into(),
            Ipv6Addr::from(*packet.get(24..)?.first_chunk::<16>()?).into(),
            packet.get(40..)?,
        ),
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes(*tcp.get(at..)?.first_chunk()?));
    Some((SocketAddr::new(source, port(0)?), SocketAddr::new(destination, port(2)?)))
}
