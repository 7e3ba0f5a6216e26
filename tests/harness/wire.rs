//! What the links of a namespace carried: every frame, kept, to be searched.

use std::io::Read as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
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
    socket.set_recv_buffer_size(64 << 20).expect("a socket option");
    socket
}
