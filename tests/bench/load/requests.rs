//! Clients whose connections last: each asks again when it has its answer.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use harness::Namespace;

use super::{ANSWER, Done, EVENTS, LASTING, PATIENCE, Plan, REQUEST, wait};
use crate::interrupt;

/// Request and answer, again and again on the same connections.
pub(crate) fn run(pod: &Namespace, plan: Plan) -> Result<Done> {
    pod.run(move || run_here(plan))
}

/// How long it takes from the first step of a connection to the last byte of its first answer.
pub(crate) fn first_answer(pod: &Namespace, server: IpAddr) -> Result<Duration> {
    let one = move || -> io::Result<Duration> {
        let begun = Instant::now();
        let mut stream = TcpStream::connect(SocketAddr::new(server, LASTING))?;
        stream.write_all(&[b'r'; REQUEST])?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.read_exact(&mut [0; ANSWER])?;
        Ok(begun.elapsed())
    };
    pod.run(one).context("waiting for a first answer")
}

fn run_here(plan: Plan) -> Result<Done> {
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
