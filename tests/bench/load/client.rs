//! The clients: a number of them on one thread, each of which waits for its answer before it asks again.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use socket2::{Domain, Protocol, Socket, Type};

use harness::Namespace;

use super::{ANSWER, CLOSING, EVENTS, LASTING, REQUEST};
use crate::interrupt;

/// How long nothing may happen before the load counts as stuck.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often the loops look around, in milliseconds.
const LOOK: u16 = 100;
/// How long a client waits after a connection that failed.
const PAUSE: Duration = Duration::from_millis(1);

/// Who closes a connection first, and so keeps it in TIME_WAIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClosesFirst {
    Server,
    Client,
}

/// What to do, and for how long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) server: std::net::IpAddr,
    pub(crate) clients: usize,
    /// Not counted, before the rest.
    pub(crate) warm_up: Duration,
    pub(crate) lasting: Duration,
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Done {
    /// Of each request, or each connection with its request, in nanoseconds, ascending.
    pub(crate) latencies: Vec<u32>,
    /// How many were done in each second.
    pub(crate) seconds: Vec<u32>,
    pub(crate) failures: u64,
    pub(crate) elapsed: Duration,
}

impl Done {
    /// How many were done in a second.
    pub(crate) fn rate(&self) -> f64 {
        self.latencies.len() as f64 / self.elapsed.as_secs_f64()
    }

    /// The latency that this share of all did not exceed, in microseconds.
    pub(crate) fn percentile(&self, share: f64) -> f64 {
        let last = self.latencies.len().saturating_sub(1);
        self.latencies
            .get((last as f64 * share).round() as usize)
            .map_or(f64::NAN, |nanoseconds| f64::from(*nanoseconds) / 1000.0)
    }

    fn count(&mut self, begun: Instant, started: Instant, now: Instant) {
        if now < begun {
            return;
        }
        let latency = now.duration_since(started).as_nanos();
        self.latencies.push(u32::try_from(latency).unwrap_or(u32::MAX));
        let second = now.duration_since(begun).as_secs() as usize;
        if self.seconds.len() <= second {
            self.seconds.resize(second + 1, 0);
        }
        self.seconds[second] += 1;
    }

    fn finish(mut self, elapsed: Duration) -> Self {
        self.latencies.sort_unstable();
        self.elapsed = elapsed;
        self
    }
}

/// Request and answer, again and again on the same connections.
pub(crate) fn requests(pod: &Namespace, plan: Plan) -> Result<Done> {
    pod.run(move || requests_here(plan))
}

/// Opens this many connections in the pod, has one request answered on each, and leaves them open.
pub(crate) fn open(pod: &Namespace, server: std::net::IpAddr, count: usize) -> Result<Vec<TcpStream>> {
    let one = move || -> io::Result<TcpStream> {
        let mut stream = TcpStream::connect(SocketAddr::new(server, LASTING))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(&[b'r'; REQUEST])?;
        stream.read_exact(&mut [0; ANSWER])?;
        Ok(stream)
    };
    pod.run(move || {
        let open = (0..count).map(|number| {
            interrupt::check()?;
            one().with_context(|| format!("connection {number}"))
        });
        open.collect()
    })
}

/// A connection, a request, an answer and the end, again and again.
pub(crate) fn connections(pod: &Namespace, plan: Plan, closes_first: ClosesFirst) -> Result<Done> {
    pod.run(move || Connecting::new(plan, closes_first)?.run())
}

fn requests_here(plan: Plan) -> Result<Done> {
    struct Client {
        stream: TcpStream,
        asked: Instant,
        missing: usize,
    }
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let mut clients = Vec::with_capacity(plan.clients);
    for number in 0..plan.clients {
        let to = SocketAddr::new(plan.server, LASTING);
        let stream = TcpStream::connect_timeout(&to, PATIENCE).with_context(|| format!("connecting to {to}"))?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, number as u64))?;
        clients.push(Client { stream, asked: Instant::now(), missing: ANSWER });
    }
    let mut done = Done::default();
    let begun = Instant::now() + plan.warm_up;
    let (mut now, mut last) = (Instant::now(), Instant::now());
    for client in &mut clients {
        client.asked = now;
        client.stream.write_all(&[b'r'; REQUEST])?;
    }
    let (mut events, mut buffer) = ([EpollEvent::empty(); EVENTS], [0; 4096]);
    while now < begun + plan.lasting {
        interrupt::check()?;
        let count = wait(&epoll, &mut events)?;
        for event in &events[..count] {
            let client = &mut clients[event.data() as usize];
            match client.stream.read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Ok(0) => bail!("the connection was closed"),
                read => client.missing = client.missing.saturating_sub(read.context("reading an answer")?),
            }
            if client.missing > 0 {
                continue;
            }
            now = Instant::now();
            last = now;
            done.count(begun, client.asked, now);
            (client.asked, client.missing) = (now, ANSWER);
            client.stream.write_all(&[b'r'; REQUEST]).context("asking")?;
        }
        now = Instant::now();
        ensure!(now.duration_since(last) < PATIENCE, "no answer for {PATIENCE:?}");
    }
    Ok(done.finish(now.duration_since(begun)))
}

/// Waits for events, but not for long.
fn wait(epoll: &Epoll, events: &mut [EpollEvent]) -> Result<usize> {
    match epoll.wait(events, LOOK) {
        Err(Errno::EINTR) => Ok(0),
        other => Ok(other?),
    }
}

/// Clients that connect anew for each request.
struct Connecting {
    plan: Plan,
    closes_first: ClosesFirst,
    epoll: Epoll,
    clients: Vec<Client>,
    begun: Instant,
    done: Done,
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
    fn new(plan: Plan, closes_first: ClosesFirst) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let now = Instant::now();
        let idle = || Client { stream: None, started: now, asked: false, missing: ANSWER };
        let clients = std::iter::repeat_with(idle).take(plan.clients).collect();
        Ok(Self { plan, closes_first, epoll, clients, begun: now + plan.warm_up, done: Done::default() })
    }

    fn run(mut self) -> Result<Done> {
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
            if now > self.begun + self.plan.lasting {
                return Ok(self.done.finish(now.duration_since(self.begun)));
            }
            self.retry(now)?;
        }
    }

    /// Those that failed try again, and those that hear nothing give up.
    fn retry(&mut self, now: Instant) -> Result<()> {
        for number in 0..self.clients.len() {
            let client = &self.clients[number];
            let waited = now.duration_since(client.started);
            if client.stream.is_none() && waited > PAUSE {
                self.connect(number)?;
            } else if client.stream.is_some() && waited > PATIENCE {
                self.fail(number);
            }
        }
        Ok(())
    }

    fn connect(&mut self, number: usize) -> Result<()> {
        let port = if self.closes_first == ClosesFirst::Server { CLOSING } else { LASTING };
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
        match self.clients[number].advance(self.closes_first) {
            Progress::Going => Ok(()),
            Progress::Failed => {
                self.fail(number);
                Ok(())
            }
            Progress::Finished => {
                self.clients[number].stream = None;
                self.done.count(self.begun, self.clients[number].started, Instant::now());
                self.connect(number)
            }
        }
    }
}

impl Client {
    fn advance(&mut self, closes_first: ClosesFirst) -> Progress {
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
            if self.missing == 0 && closes_first == ClosesFirst::Client {
                return Progress::Finished;
            }
        }
    }
}
