use std::io::IoSliceMut;

use super::*;
use crate::relay::{Broken, Sink, Source};
use crate::tunnel::tls_stream::tests::{Bytes as Given, ours};

const SOON: Duration = Duration::from_secs(5);
const TO: &str = "10.0.0.2:80";
const FROM: &str = "10.0.0.1:4000";

/// Both ends of a stream.
type Ends = ((HboneSource, HboneSink), (HboneSource, HboneSink));

fn wish() -> Open {
    Open::new(FROM.parse().unwrap(), TO.parse().unwrap())
}

/// Both ends of a tunnel over a real connection.
async fn tunnel() -> (Outbound, Inbound) {
    let (near, far) = ours().await;
    let (near, far) = tokio::join!(Outbound::start(near), Inbound::start(far));
    (near.unwrap(), far.unwrap())
}

async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, work).await.expect("in time")
}

/// Opens a stream and accepts it.
async fn open(near: &Outbound, far: &mut Inbound) -> Ends {
    let place = near.place().expect("room");
    let wish = wish();
    let opening = near.open(place, &wish);
    let mut accepted = None;
    let accepting = async {
        loop {
            let request = far.next().await.expect("open").expect("whole");
            accepted = Some(request.accept().unwrap());
        }
    };
    let opened = within(async {
        tokio::select! { opened = opening => opened.unwrap(), () = accepting => unreachable!() }
    })
    .await;
    (opened, accepted.expect("was asked"))
}

/// Keeps a tunnel going.
fn drive(mut far: Inbound) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move { while let Some(Ok(_request)) = far.next().await {} })
}

async fn write(sink: &mut HboneSink, bytes: &[u8]) {
    let mut given = Given::new(bytes);
    while within(poll_fn(|cx| sink.poll_move(cx, &mut given))).await.unwrap() > 0 {}
    within(poll_fn(|cx| sink.poll_flush(cx))).await.unwrap();
}

/// All that comes until the end, and whether that is in order.
async fn read_to_end(source: &mut HboneSource) -> (Vec<u8>, bool) {
    let mut seen = Vec::new();
    loop {
        let mut place = vec![0; 7_001];
        match within(poll_fn(|cx| source.poll_read(cx, &mut [IoSliceMut::new(&mut place)]))).await {
            Ok(0) => return (seen, true),
            Ok(bytes) => seen.extend_from_slice(&place[..bytes]),
            Err(Broken(_)) => return (seen, false),
        }
    }
}

#[tokio::test]
async fn a_reset_shows_behind_what_nobody_takes_and_takes_nothing_of_it() {
    let (near, mut far) = tunnel().await;
    let ((_source, mut sink), (mut source, mut back)) = open(&near, &mut far).await;
    let _driven = drive(far);
    // Nobody writes in the other direction any more: what is noticed there is noticed no more.
    within(poll_fn(|cx| back.poll_finish(cx))).await.unwrap();
    let mut sent = Vec::new();
    for (number, length) in [1, 20_000, 3, 5_000, 2, 2, 30_000].into_iter().enumerate() {
        let part = vec![number as u8; length];
        write(&mut sink, &part).await;
        sent.extend(part);
    }
    assert!(matches!(within(poll_fn(|cx| source.poll_fill(cx))).await, Ok(Some(()))));
    let mut cx = Context::from_waker(std::task::Waker::noop());
    assert!(source.poll_broken(&mut cx).is_pending());
    sink.reset();
    within(poll_fn(|cx| source.poll_broken(cx))).await;
    let (seen, in_order) = read_to_end(&mut source).await;
    assert!(seen == sent && !in_order, "{} bytes of {}, in order: {in_order}", seen.len(), sent.len());
}

#[tokio::test]
async fn an_end_that_is_seen_early_is_an_end_all_the_same() {
    let (near, mut far) = tunnel().await;
    let ((_source, mut sink), (mut source, _back)) = open(&near, &mut far).await;
    let _driven = drive(far);
    for _ in 0..2_000 {
        write(&mut sink, b"little").await;
    }
    within(poll_fn(|cx| sink.poll_finish(cx))).await.unwrap();
    assert!(matches!(within(poll_fn(|cx| source.poll_fill(cx))).await, Ok(Some(()))));
    let broken = tokio::time::timeout(Duration::from_millis(200), poll_fn(|cx| source.poll_broken(cx))).await;
    assert!(broken.is_err() && source.kept.end == Some(Ok(())), "{broken:?}");
    assert!(source.kept.chunks.len() < 10, "small chunks are put together");
    assert_eq!(read_to_end(&mut source).await, (b"little".repeat(2_000), true));
}

/// Accepts the streams of a tunnel, and gives them.
fn accept_all(mut far: Inbound) -> tokio::sync::mpsc::UnboundedReceiver<(HboneSource, HboneSink)> {
    let (give, accepted) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(request)) = far.next().await {
            give.send(request.accept().unwrap()).expect("the test listens");
        }
    });
    accepted
}

#[tokio::test]
async fn streams_that_nobody_reads_hold_little_and_hold_no_other_up() {
    let (near, far) = tunnel().await;
    let mut accepted = accept_all(far);
    let much: &'static [u8] = vec![7; 8 << 20].leak();
    let mut stalled = Vec::new();
    for _ in 0..STREAMS - 1 {
        let place = near.place().expect("room");
        let (source, mut sink) = within(near.open(place, &wish())).await.unwrap();
        tokio::spawn(async move {
            let _source = source;
            let mut given = Given::new(much);
            while poll_fn(|cx| sink.poll_move(cx, &mut given)).await.is_ok_and(|bytes| bytes > 0) {}
        });
        let (mut source, kept) = within(accepted.recv()).await.unwrap();
        assert!(matches!(within(poll_fn(|cx| source.poll_fill(cx))).await, Ok(Some(()))));
        let source = Arc::new(Mutex::new(source));
        stalled.push(Arc::clone(&source));
        // As a relay does whose sink takes nothing.
        tokio::spawn(async move {
            let _kept = kept;
            poll_fn(|cx| source.lock().unwrap().poll_broken(cx)).await;
        });
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let held = || -> usize { stalled.iter().map(|source| source.lock().unwrap().stream.flow_control().used_capacity()).sum() };
    let before = held();
    assert!((64 << 10..2 << 20).contains(&before), "{before} bytes are held");

    let place = near.place().expect("room");
    let (_source, mut sink) = within(near.open(place, &wish())).await.unwrap();
    let (mut source, _sink) = within(accepted.recv()).await.unwrap();
    let sending = tokio::spawn(async move {
        for _ in 0..4 {
            write(&mut sink, much).await;
        }
        within(poll_fn(|cx| sink.poll_finish(cx))).await.unwrap();
    });
    let (seen, in_order) = read_to_end(&mut source).await;
    sending.await.unwrap();
    assert!(seen.len() == 4 * much.len() && in_order, "{} bytes beside those that stand still", seen.len());
    // The tunnel's window has grown meanwhile, and theirs with it.
    assert!(held() < 32 << 20, "{} bytes are held", held());
}

#[tokio::test]
async fn a_peer_that_reads_nothing_is_sent_little_whatever_its_windows() {
    let (io, far) = ours().await;
    let far = tokio::spawn(Inbound::start(far));
    let mut builder = client::Builder::new();
    builder.initial_window_size(1 << 30).initial_connection_window_size(1 << 30);
    let (mut requests, mut connection) = builder.handshake::<_, Bytes>(io).await.unwrap();
    let opening = async {
        let mut accepted = accept_all(far.await.unwrap().unwrap());
        let (mut streams, mut kept) = (Vec::new(), Vec::new());
        for _ in 0..50 {
            requests = within(requests.clone().ready()).await.unwrap();
            let request = Request::builder().method(Method::CONNECT).uri(TO).body(()).unwrap();
            kept.push(requests.send_request(request, false).unwrap());
            streams.push(within(accepted.recv()).await.unwrap());
        }
        // Long enough for its windows to have arrived.
        tokio::time::sleep(Duration::from_millis(50)).await;
        (streams, kept)
    };
    let (streams, kept) = tokio::select! { opened = opening => opened, _ = &mut connection => unreachable!() };
    // From here on nobody reads.
    let shared = Arc::clone(&streams[0].1.place.tunnel);
    let much: &'static [u8] = vec![7; 8 << 20].leak();
    for (source, mut sink) in streams {
        tokio::spawn(async move {
            let _source = source;
            let mut given = Given::new(much);
            while poll_fn(|cx| sink.poll_move(cx, &mut given)).await.is_ok_and(|bytes| bytes > 0) {}
        });
    }
    let mut most = 0;
    for _ in 0..50 {
        tokio::time::sleep(Duration::from_millis(10)).await;
        most = most.max(shared.unsent.load(Ordering::Relaxed));
    }
    assert!((UNSENT / 2..3 * UNSENT).contains(&most), "{most} bytes wait");
    drop((kept, connection));
}

#[tokio::test]
async fn a_stream_says_who_dialled_and_which_it_comes_after() {
    let (near, mut far) = tunnel().await;
    let asked = |(source, after): (&str, Option<u16>)| {
        let wish = Open { after, ..Open::new(source.parse().unwrap(), TO.parse().unwrap()) };
        let (near, place) = (&near, near.place().expect("room"));
        async move { near.open(place, &wish).await.err() }
    };
    let mut asking = Box::pin(async { tokio::join!(asked(("10.0.0.1:4001", Some(4000))), asked(("[fd00::1]:4002", None))) });
    for said in [(Some("10.0.0.1:4001"), Some(4000)), (Some("[fd00::1]:4002"), None)] {
        let request = within(async {
            tokio::select! { request = far.next() => request.unwrap().unwrap(), _ = &mut asking => unreachable!() }
        })
        .await;
        assert_eq!((request.source().map(|source| source.to_string()).as_deref(), request.after()), said);
    }
}

#[tokio::test]
async fn an_accepted_tunnel_ends_when_it_has_carried_nothing_for_long() {
    let (near, mut far) = tunnel().await;
    let (ends, peers_ends) = open(&near, &mut far).await;
    tokio::time::pause();
    let hour = tokio::time::timeout(Duration::from_secs(3600), far.next()).await;
    assert!(hour.is_err() && !near.closed(), "it carries a stream");
    drop((ends, peers_ends));
    let started = tokio::time::Instant::now();
    // The peer may be faster to close.
    assert!(!matches!(far.next().await, Some(Ok(_))));
    let idle = started.elapsed();
    assert!(idle >= ACCEPTED_IDLE && idle < ACCEPTED_IDLE + 2 * IDLE_PART, "after {idle:?}");
    assert!(near.place().is_none(), "the peer has been told");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn streams_that_wait_for_the_connection_go_on_when_it_does() {
    let (near, far) = tunnel().await;
    let mut accepted = accept_all(far);
    let much: &'static [u8] = vec![7; 4 << 20].leak();
    let (mut sending, mut receiving) = (tokio::task::JoinSet::new(), tokio::task::JoinSet::new());
    for _ in 0..20 {
        let place = near.place().expect("room");
        let (source, mut sink) = within(near.open(place, &wish())).await.unwrap();
        sending.spawn(async move {
            write(&mut sink, much).await;
            within(poll_fn(|cx| sink.poll_finish(cx))).await.unwrap();
            (source, sink)
        });
        let (mut source, back) = within(accepted.recv()).await.unwrap();
        receiving.spawn(async move {
            let (seen, in_order) = read_to_end(&mut source).await;
            assert!(seen.len() == much.len() && in_order, "{} bytes, in order: {in_order}", seen.len());
            (source, back)
        });
    }
    let _ends = (receiving.join_all().await, sending.join_all().await);
}
