use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::relay::tcp::{self, TcpSink};
use crate::relay::{Sink as _, Source as _};
use crate::tunnel::tls_stream::TlsStream;
use crate::tunnel::tls_stream::tests::ours;

const KEY: &str = "cart to stock";
const SOON: Duration = Duration::from_secs(5);
/// The far end's ports.
const SERVED: u16 = 80;
const REFUSED: u16 = 81;
const SILENT: u16 = 82;
/// What the far end does with the next stream: serve it, or end its tunnel, with or without taking leave.
const SERVES: usize = 0;
const LEAVES: usize = 1;
const BREAKS: usize = 2;

/// The destination's agent, in either form.
#[derive(Default)]
struct Far {
    single: AtomicBool,
    dialled: AtomicUsize,
    /// Its certificate ends when it has been shown.
    ended: AtomicBool,
    /// Cuts the tunnels that are there.
    cut: Mutex<CancellationToken>,
    /// What the next stream's tunnel comes to.
    next_ends: AtomicUsize,
    /// How many streams a tunnel has carried at once, at the most.
    most: AtomicUsize,
    /// Nobody can be dialled while this is held.
    gate: tokio::sync::RwLock<()>,
    /// How many are dialling, and how many were at the most.
    dialling: AtomicUsize,
    most_dialling: AtomicUsize,
}

impl Far {
    fn new(single: bool) -> Arc<Self> {
        Arc::new(Self { single: single.into(), ..Self::default() })
    }

    fn dialled(&self) -> usize {
        self.dialled.load(Ordering::Relaxed)
    }

    async fn dial(self: &Arc<Self>) -> Result<Dialled, TunnelError> {
        let dialling = self.dialling.fetch_add(1, Ordering::Relaxed) + 1;
        self.most_dialling.fetch_max(dialling, Ordering::Relaxed);
        let _open = self.gate.read().await;
        self.dialled.fetch_add(1, Ordering::Relaxed);
        let (near, far) = ours().await;
        self.dialling.fetch_sub(1, Ordering::Relaxed);
        let single = self.single.load(Ordering::Relaxed);
        let (this, cut) = (Arc::clone(self), lock(&self.cut).clone());
        tokio::spawn(async move {
            let serve = async { if single { this.serve_single(far).await } else { this.serve_hbone(far).await } };
            cut.run_until_cancelled(serve).await
        });
        let tunnel = if single { Tunnel::Single(Idle::new(near)) } else { Tunnel::Hbone(hbone::Outbound::start(near).await?) };
        let left = if self.ended.load(Ordering::Relaxed) { Duration::ZERO } else { Duration::from_secs(3600) };
        Ok(Dialled { expires: SystemTime::now() + left, tunnel })
    }

    /// Serves streams that end as soon as they are open.
    async fn serve_single(&self, io: TlsStream) {
        let mut idle = Idle::new(io);
        while let Ok(Some((open, mut stream))) = idle.next(std::future::pending()).await {
            match self.next_ends.swap(SERVES, Ordering::Relaxed) {
                LEAVES => return stream.sink.take_leave(),
                BREAKS => return,
                _ => {}
            }
            if open.destination.port() == REFUSED {
                stream.sink.answer(Some(CloseReason::PolicyDenied)).await.expect("open");
                idle = stream.refuse().expect("nothing out of turn");
                continue;
            }
            stream.sink.answer(None).await.expect("open");
            std::future::poll_fn(|cx| stream.sink.poll_finish(cx)).await.expect("open");
            let Ok(None) = std::future::poll_fn(|cx| stream.source.poll_fill(cx)).await else { return };
            idle = stream.end().expect("ended in order");
        }
    }

    async fn serve_hbone(&self, io: TlsStream) {
        let mut tunnel = hbone::Inbound::start(io).await.expect("HTTP/2");
        let mut kept = Vec::new();
        while let Some(Ok(request)) = tunnel.next().await {
            match request.destination().map(|destination| destination.port()) {
                Some(SERVED) => {
                    kept.push(request.accept().map(Some).unwrap_or_default());
                    self.most.fetch_max(kept.len(), Ordering::Relaxed);
                }
                Some(SILENT) => std::mem::forget(request),
                _ => request.refuse(CloseReason::PolicyDenied),
            }
        }
    }

    fn cut(&self) {
        std::mem::take(&mut *lock(&self.cut)).cancel();
    }
}

fn to(port: u16) -> Open {
    Open::new("10.0.0.1:4000".parse().unwrap(), SocketAddr::from(([10, 0, 0, 2], port)))
}

/// Somebody who has nobody's turn to wait for.
fn asks(port: u16) -> (impl Fn() -> std::future::Ready<()>, impl Fn() -> Open) {
    (|| std::future::ready(()), move || to(port))
}

async fn open(pool: &Pool<&'static str, ()>, far: &Arc<Far>, port: u16) -> Result<Stream, TunnelError> {
    open_with(pool, far, port, b"").await
}

/// Opens a stream for an application that has said this already.
async fn open_with(pool: &Pool<&'static str, ()>, far: &Arc<Far>, port: u16, first: &[u8]) -> Result<Stream, TunnelError> {
    let (mut client, (mut near, _sink)) = near().await;
    // On loopback it has arrived when it has been sent.
    client.write_all(first).await.expect("sent");
    let opening = pool.open(&KEY, asks(port), &mut near, || Ok(()), |()| far.dial());
    tokio::time::timeout(SOON, opening).await.expect("an answer in time")
}

/// A connection of an application's: its own end, and what the agent reads from.
async fn near() -> (TcpStream, (TcpSource, TcpSink)) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let client = TcpStream::connect(listener.local_addr().expect("an address")).await.expect("a connection");
    (client, tcp::split(listener.accept().await.expect("a connection").0))
}

/// Opens many at once, and gives those that did.
async fn open_many(pool: &Arc<Pool<&'static str, ()>>, far: &Arc<Far>, many: usize) -> Vec<Stream> {
    let mut opening = JoinSet::new();
    for _ in 0..many {
        let (pool, far) = (Arc::clone(pool), Arc::clone(far));
        opening.spawn(async move { open(&pool, &far, SERVED).await.expect("a stream") });
    }
    opening.join_all().await
}

/// Ends a stream of the single form in order, from both sides.
async fn end(stream: Stream) {
    let Stream::Single(mut stream, home) = stream else { panic!("the tunnel is shared") };
    std::future::poll_fn(|cx| stream.sink.poll_finish(cx)).await.expect("open");
    assert!(matches!(std::future::poll_fn(|cx| stream.source.poll_fill(cx)).await, Ok(None)));
    home.take_back(stream);
}

#[tokio::test]
async fn whoever_picks_a_shared_tunnel_has_a_place_in_it() {
    let (far, slot) = (Far::new(false), Slot::default());
    let mut picked = Vec::new();
    for tunnels in 1..=3 {
        picked.push(slot.add(far.dial().await.unwrap()).unwrap());
        picked.extend(std::iter::from_fn(|| slot.usable()).take(1000));
        assert_eq!(picked.len(), tunnels * hbone::STREAMS as usize, "in {tunnels} tunnels");
    }
    picked.pop();
    assert!(slot.usable().is_some(), "the place of a stream that has ended is free");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_opens_at_once_share_tunnels_and_none_waits_for_anothers_end() {
    let (far, pool) = (Far::new(false), Arc::new(Pool::new()));
    let mut streams = vec![open(&pool, &far, SERVED).await.unwrap()];
    streams.extend(open_many(&pool, &far, 350).await);
    assert_eq!((far.dialled(), pool.len()), (4, 4));
    assert_eq!(far.most.load(Ordering::Relaxed), hbone::STREAMS as usize);
}

#[tokio::test]
async fn nobody_waits_for_a_destination_that_is_not_his() {
    let (far, pool) = (Far::new(false), Arc::new(Pool::new()));
    let gate = far.gate.write().await;
    let mut opening = JoinSet::new();
    for port in [SILENT, SILENT, SERVED] {
        let (pool, far) = (Arc::clone(&pool), Arc::clone(&far));
        opening.spawn(async move {
            let (_client, (mut near, _sink)) = near().await;
            pool.open(&KEY, asks(port), &mut near, || Ok(()), |()| far.dial()).await.map(|_stream| port)
        });
        tokio::task::yield_now().await;
    }
    drop(gate);
    let first = tokio::time::timeout(SOON, opening.join_next()).await.expect("an answer in time");
    assert_eq!(first.unwrap().unwrap().unwrap(), SERVED);
    assert_eq!(far.dialled(), 1);
}

#[tokio::test]
async fn a_tunnel_of_the_single_form_carries_the_next_stream_when_one_has_ended() {
    let (far, pool) = (Far::new(true), Pool::new());
    for _ in 0..3 {
        end(open(&pool, &far, SERVED).await.unwrap()).await;
    }
    assert_eq!((far.dialled(), pool.len()), (1, 1));
    let two = [open(&pool, &far, SERVED).await.unwrap(), open(&pool, &far, SERVED).await.unwrap()];
    assert_eq!((far.dialled(), pool.len()), (2, 0));
    let [one, other] = two;
    end(one).await;
    drop(other);
    assert_eq!(pool.len(), 1, "a stream that was dropped takes its tunnel with it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_burst_makes_its_tunnels_some_at_a_time() {
    let (far, pool) = (Far::new(true), Arc::new(Pool::new()));
    let _one_more = open(&pool, &far, SERVED).await.unwrap();
    let streams = open_many(&pool, &far, 4 * HANDSHAKES).await;
    assert_eq!((streams.len(), far.dialled()), (4 * HANDSHAKES, 1 + 4 * HANDSHAKES));
    let most = far.most_dialling.load(Ordering::Relaxed);
    assert!((2..=HANDSHAKES).contains(&most), "{most} at once");
}

#[tokio::test]
async fn a_burst_takes_the_tunnels_that_are_given_back_meanwhile() {
    let (far, pool) = (Far::new(true), Arc::new(Pool::new()));
    let open_before = open(&pool, &far, SERVED).await.unwrap();
    let gate = far.gate.write().await;
    let dialling = tokio::spawn({
        let (pool, far) = (Arc::clone(&pool), Arc::clone(&far));
        async move { open_many(&pool, &far, HANDSHAKES).await.len() }
    });
    while far.dialling.load(Ordering::Relaxed) < HANDSHAKES {
        tokio::task::yield_now().await;
    }
    let (_client, (mut near, _sink)) = near().await;
    let mut waiting = pin!(pool.open(&KEY, asks(SERVED), &mut near, || Ok(()), |()| far.dial()));
    assert!(futures_util::poll!(&mut waiting).is_pending());
    end(open_before).await;
    waiting.await.expect("the tunnel that was there");
    drop(gate);
    assert_eq!(dialling.await.expect("no panic"), HANDSHAKES);
    assert_eq!(far.dialled(), 1 + HANDSHAKES);
}

#[tokio::test]
async fn a_destination_that_goes_back_to_http2_is_dialled_once_for_all() {
    let (far, pool) = (Far::new(true), Arc::new(Pool::new()));
    end(open(&pool, &far, SERVED).await.unwrap()).await;
    far.single.store(false, Ordering::Relaxed);
    for dialled in [2, 3] {
        far.cut();
        tokio::task::yield_now().await;
        // What it speaks now is found out by the first to dial.
        if dialled == 2 {
            drop(open(&pool, &far, SERVED).await.unwrap());
        }
        drop(open_many(&pool, &far, 20).await);
        assert_eq!(far.dialled(), dialled);
    }
}

#[tokio::test]
async fn a_refusal_is_an_answer_and_keeps_the_tunnel() {
    for single in [false, true] {
        let (far, pool) = (Far::new(single), Pool::new());
        for _ in 0..3 {
            let refused = open(&pool, &far, REFUSED).await;
            assert!(matches!(refused, Err(TunnelError::Refused { reason: CloseReason::PolicyDenied })), "{refused:?}");
        }
        assert_eq!((far.dialled(), pool.len()), (1, 1), "single: {single}");
    }
}

/// How many bytes of the stream went with its OPEN.
fn early(stream: &Stream) -> usize {
    let Stream::Single(stream, _) = stream else { panic!("the tunnel is shared") };
    stream.sink.early()
}

#[tokio::test]
async fn only_a_tunnel_that_has_just_carried_a_stream_takes_the_first_bytes_before_the_answer() {
    let (far, pool) = (Far::new(true), Pool::new());
    let stream = open_with(&pool, &far, SERVED, b"first").await.unwrap();
    assert_eq!(early(&stream), 0, "the peer had not accepted us");
    end(stream).await;
    let stream = open_with(&pool, &far, SERVED, b"first").await.unwrap();
    assert_eq!((early(&stream), far.dialled()), (5, 1));
    let stream = open_with(&pool, &far, SERVED, b"first").await.unwrap();
    end(stream).await;
    for (slot, ()) in lock(&pool.slots).values() {
        for warm in &mut slot.lock().idle {
            warm.last_used = warm.last_used.checked_sub(FRESH).expect("a machine that runs for a second");
        }
    }
    assert_eq!(early(&open_with(&pool, &far, SERVED, b"first").await.unwrap()), 0, "it may have broken unseen");
}

#[tokio::test]
async fn first_bytes_are_sent_again_only_when_nobody_can_have_acted_on_them() {
    for (left, dialled) in [(true, 2), (false, 1)] {
        let (far, pool) = (Far::new(true), Pool::new());
        end(open(&pool, &far, SERVED).await.unwrap()).await;
        far.next_ends.store(if left { LEAVES } else { BREAKS }, Ordering::Relaxed);
        let opened = open_with(&pool, &far, SERVED, b"first").await;
        assert_eq!((opened.is_ok(), far.dialled()), (left, dialled), "{opened:?}");
        assert!(left || matches!(opened, Err(TunnelError::Lost(_))), "{opened:?}");
    }
}

#[tokio::test]
async fn a_source_that_has_reset_its_connection_is_not_carried_and_keeps_the_tunnel() {
    let (far, pool) = (Far::new(true), Pool::new());
    end(open(&pool, &far, SERVED).await.unwrap()).await;
    let (client, (mut near, _sink)) = near().await;
    tcp::reset_on_close(&client);
    drop(client);
    let opened = pool.open(&KEY, asks(SERVED), &mut near, || Ok(()), |()| far.dial()).await;
    assert!(matches!(&opened, Err(error) if error.reason() == CloseReason::SourceReset), "{opened:?}");
    end(open(&pool, &far, SERVED).await.unwrap()).await;
    assert_eq!((far.dialled(), pool.len()), (1, 1));
}

#[tokio::test]
async fn a_tunnel_that_has_broken_is_replaced() {
    for single in [false, true] {
        let (far, pool) = (Far::new(single), Pool::new());
        for dialled in 1..=3 {
            let stream = open(&pool, &far, SERVED).await.unwrap();
            assert_eq!(far.dialled(), dialled, "single: {single}");
            if single {
                end(stream).await;
            }
            far.cut();
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn a_peer_whose_certificate_has_ended_has_to_show_another() {
    for single in [false, true] {
        let (far, pool) = (Far::new(single), Pool::new());
        far.ended.store(true, Ordering::Relaxed);
        for dialled in 1..=3 {
            let stream = open(&pool, &far, SERVED).await.unwrap();
            if single {
                end(stream).await;
            }
            assert_eq!(far.dialled(), dialled, "single: {single}");
        }
        pool.sweep(Instant::now());
        assert!(pool.is_empty(), "single: {single}");
    }
}

#[tokio::test]
async fn what_is_retired_is_used_no_more_and_what_is_open_goes_on() {
    let (far, pool) = (Far::new(true), Pool::new());
    let (one, other) = (open(&pool, &far, SERVED).await.unwrap(), open(&pool, &far, SERVED).await.unwrap());
    end(one).await;
    assert_eq!(pool.len(), 1);
    pool.retire(|key| *key != KEY);
    assert_eq!(pool.len(), 1, "of another key");
    pool.retire(|key| *key == KEY);
    assert!(pool.is_empty());
    end(other).await;
    assert!(pool.is_empty(), "its tunnel is not kept");
    end(open(&pool, &far, SERVED).await.unwrap()).await;
    assert_eq!((far.dialled(), pool.len()), (3, 1));
}

#[tokio::test]
async fn tunnels_without_streams_are_kept_for_a_while() {
    for single in [false, true] {
        let (far, pool) = (Far::new(single), Pool::new());
        let stream = open(&pool, &far, SERVED).await.unwrap();
        let later = Instant::now() + IDLE + SOON;
        pool.sweep(later);
        if single {
            end(stream).await;
        } else {
            assert_eq!(pool.len(), 1, "it carries a stream");
            drop(stream);
        }
        pool.sweep(Instant::now());
        assert_eq!(pool.len(), 1, "single: {single}");
        pool.sweep(later + IDLE + SOON);
        assert!(pool.is_empty(), "single: {single}");
        assert!(lock(&pool.slots).is_empty(), "nor is its place in the table kept");
    }
}
