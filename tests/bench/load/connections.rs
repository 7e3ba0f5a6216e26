//! Clients that connect anew for each request.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use socket2::{Domain, Protocol, Socket, Type};

use harness::Namespace;

use super::{ANSWER, CLOSING, Done, EVENTS, LASTING, PATIENCE, Plan, REQUEST, wait};
use crate::interrupt;

/// How long a client waits after a connection that failed.
const PAUSE: Duration = Duration::from_millis(1);
/// How many connections are under way while many are opened, and how long that may take.
const AT_A_TIME: usize = 32;
const PATIENCE_FOR_ALL: Duration = Duration::from_secs(60);

/// How a connection ends once it has its answer. Whoever closes first keeps it in TIME_WAIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    ServerCloses,
    ClientCloses,
    /// It stays open. There are no more than this many.
    Kept(usize),
}

/// A connection, a request, an answer and the end, again and again.
pub(crate) fn run(pod: &Namespace, plan: Plan, ending: Ending) -> Result<Done> {
    pod.run(move || Ok(Connecting::new(plan, ending)?.run()?.0))
}

/// Opens this many connections, a few at a time, has a request answered on each, and leaves them open.
pub(crate) fn open(pod: &Namespace, server: IpAddr, count: usize) -> Result<(Done, Vec<TcpStream>)> {
    let plan = Plan { server, clients: AT_A_TIME.min(count), warm_up: Duration::ZERO, lasting: PATIENCE_FOR_ALL };
    let (done, kept) = pod.run(move || Connecting::new(plan, Ending::Kept(count))?.run())?;
    ensure!(kept.len() == count, "{} of {count} connections were opened, and {} failed", kept.len(), done.failures);
    Ok((done, kept))
}

struct Connecting {
    plan: Plan,
    ending: Ending,
    epoll: Epoll,
    clients: Vec<Client>,
    begun: Instant,
    done: Done,
    kept: Vec<TcpStream>,
}

struct Client {
    /// None after a failure, until the next attempt.
    stream: Option<TcpStream>,
    started: Instant,
    asked: bool,
    missing: usize,
}

/// What became of a connection.
enum Progress {
    Going,
    Finished,
    Failed,
}

impl Connecting {
    fn new(plan: Plan, ending: Ending) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let now = Instant::now();
        let idle = || Client { stream: None, started: now, asked: false, missing: ANSWER };
        let clients = std::iter::repeat_with(idle).take(plan.clients).collect();
        let begun = now + plan.warm_up;
        Ok(Self { plan, ending, epoll, clients, begun, done: Done::default(), kept: Vec::new() })
    }

    fn run(mut self) -> Result<(Done, Vec<TcpStream>)> {
        for number in 0..self.clients.len() {
            self.connect(number)?;
        }
        let mut events = [EpollEvent::empty(); EVENTS];
        loop {
            let count = wait(&self.epoll, &mut events)?;
            for event in &events[..count] {
                self.advance(event.data() as usize)?;
            }
            interrupt::check()?;
            let now = Instant::now();
            if now > self.begun + self.plan.lasting || self.ending == Ending::Kept(self.kept.len()) {
                return Ok((self.done.finish(now.duration_since(self.begun)), self.kept));
            }
            self.retry(now)?;
        }
    }

    /// Whether a further connection is wanted.
    fn has_more(&self) -> bool {
        let Ending::Kept(most) = self.ending else { return true };
        let under_way = self.clients.iter().filter(|client| client.stream.is_some()).count();
        self.kept.len() + under_way < most
    }

    /// Those that failed try again, and those that hear nothing give up.
    fn retry(&mut self, now: Instant) -> Result<()> {
        for number in 0..self.clients.len() {
            let client = &self.clients[number];
            let waited = now.duration_since(client.started);
            if client.stream.is_none() && waited > PAUSE && self.has_more() {
                self.connect(number)?;
            } else if client.stream.is_some() && waited > PATIENCE {
                self.fail(number);
            }
        }
        Ok(())
    }

    fn connect(&mut self, number: usize) -> Result<()> {
        let port = if self.ending == Ending::ServerCloses { CLOSING } else { LASTING };
        let to = SocketAddr::new(self.plan.server, port);
        let socket = Socket::new(Domain::for_address(to), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        self.clients[number] = Client { stream: None, started: Instant::now(), asked: false, missing: ANSWER };
        match socket.connect(&to.into()) {
            Err(error) if error.raw_os_error() != Some(Errno::EINPROGRESS as i32) => {
                self.fail(number);
                return Ok(());
            }
            _ => {}
        }
        // Told once when it may be written to, and then each time that something comes.
        let interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
        self.epoll.add(&socket, EpollEvent::new(interest, number as u64))?;
        self.clients[number].stream = Some(socket.into());
        Ok(())
    }

    fn fail(&mut self, number: usize) {
        self.clients[number].stream = None;
        self.done.failures += 1;
    }

    fn advance(&mut self, number: usize) -> Result<()> {
        match self.clients[number].advance(self.ending) {
            Progress::Going => Ok(()),
            Progress::Failed => {
                self.fail(number);
                Ok(())
            }
            Progress::Finished => {
                let stream = self.clients[number].stream.take();
                if let Ending::Kept(_) = self.ending {
                    self.kept.extend(stream);
                }
                self.done.count(self.begun, self.clients[number].started, Instant::now());
                if self.has_more() { self.connect(number) } else { Ok(()) }
            }
        }
    }
}

impl Client {
    fn advance(&mut self, ending: Ending) -> Progress {
        let Some(stream) = &mut self.stream else { return Progress::Going };
        if !self.asked {
            match stream.write(&[b'r'; REQUEST]) {
                Ok(REQUEST) => self.asked = true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Progress::Going,
                // A connection whose buffer is empty takes a whole request.
                Ok(_) | Err(_) => return Progress::Failed,
            }
        }
        let mut buffer = [0; 4096];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) if self.missing == 0 => return Progress::Finished,
                Ok(0) => return Progress::Failed,
                Ok(count) => self.missing = self.missing.saturating_sub(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Progress::Going,
                Err(_) => return Progress::Failed,
            }
            if self.missing == 0 && ending != Ending::ServerCloses {
                return Progress::Finished;
            }
        }
    }
}
