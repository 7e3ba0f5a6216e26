//! The server: 1 KiB for every 128 bytes.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use socket2::{Domain, Protocol, Socket, Type};

use harness::Namespace;

use super::{ANSWER, CLOSING, EVENTS, LASTING, REQUEST};

/// How often it looks whether it shall stop, in milliseconds.
const LOOK: u16 = 100;
const BACKLOG: i32 = 4096;

/// A server in a pod; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens in the pod at both ports before it returns.
    pub(crate) fn start(pod: &Namespace) -> Result<Self> {
        let loop_ = pod.run(Loop::new).context("starting the load's server")?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            if let Err(error) = loop_.run(&stopped) {
                eprintln!("bench: the load's server: {error}");
            }
        });
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _panic_was_reported = thread.join();
        }
    }
}

#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    /// Bytes of a request that is not whole yet.
    pending: usize,
    closes: bool,
}

struct Loop {
    epoll: Epoll,
    listeners: [TcpListener; 2],
    /// By descriptor.
    connections: Vec<Option<Connection>>,
}

impl Loop {
    fn new() -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let listeners = [listen(LASTING)?, listen(CLOSING)?];
        for listener in &listeners {
            epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, listener.as_raw_fd() as u64))?;
        }
        Ok(Self { epoll, listeners, connections: Vec::new() })
    }

    fn run(mut self, stop: &AtomicBool) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); EVENTS];
        while !stop.load(Ordering::Relaxed) {
            let count = match self.epoll.wait(&mut events, LOOK) {
                Err(nix::errno::Errno::EINTR) => 0,
                other => other?,
            };
            for event in &events[..count] {
                let descriptor = event.data() as usize;
                match self.listeners.iter().position(|listener| listener.as_raw_fd() as usize == descriptor) {
                    Some(listener) => self.accept(listener)?,
                    None => self.serve(descriptor),
                }
            }
        }
        Ok(())
    }

    fn accept(&mut self, listener: usize) -> io::Result<()> {
        loop {
            let stream = match self.listeners[listener].accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                // The client has given up meanwhile.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(error) => return Err(error),
            };
            stream.set_nonblocking(true)?;
            let descriptor = stream.as_raw_fd() as usize;
            self.epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, descriptor as u64))?;
            if self.connections.len() <= descriptor {
                self.connections.resize_with(descriptor + 1, || None);
            }
            self.connections[descriptor] = Some(Connection { stream, pending: 0, closes: listener == 1 });
        }
    }

    /// Closing a descriptor takes it out of the epoll, too.
    fn serve(&mut self, descriptor: usize) {
        let Some(connection) = self.connections.get_mut(descriptor).and_then(Option::as_mut) else { return };
        if !connection.serve().unwrap_or(false) {
            self.connections[descriptor] = None;
        }
    }
}

impl Connection {
    /// Answers what has come. Whether the connection goes on.
    fn serve(&mut self) -> io::Result<bool> {
        let mut buffer = [0; 4096];
        match self.stream.read(&mut buffer) {
            Ok(0) => return Ok(false),
            Ok(count) => self.pending += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
            Err(error) => return Err(error),
        }
        while self.pending >= REQUEST {
            self.pending -= REQUEST;
            // Clients wait for an answer before they ask again, so the kernel always has room for one.
            self.stream.write_all(&[b'a'; ANSWER])?;
            if self.closes {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn listen(port: u16) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::from(([0; 4], port)).into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}
