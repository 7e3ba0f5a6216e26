use std::sync::Arc;
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::*;

/// A client and a server with a relay between them.
struct Relayed {
    client: TcpStream,
    server: TcpStream,
    counts: Arc<(AtomicU64, AtomicU64)>,
    cancel: Arc<Cancel>,
    task: JoinHandle<End>,
}

impl Relayed {
    async fn start() -> Self {
        let (client, near) = pair().await;
        let (far, server) = pair().await;
        let counts = Arc::new((AtomicU64::new(0), AtomicU64::new(0)));
        let cancel = Arc::new(Cancel::default());
        let (shared, token) = (Arc::clone(&counts), Arc::clone(&cancel));
        let task = tokio::spawn(async move {
            let ((mut near, mut near_sink), (mut far, mut far_sink)) = (tcp::split(near), tcp::split(far));
            relay((&mut near, &mut near_sink), (&mut far, &mut far_sink), (&shared.0, &shared.1), &token).await
        });
        Self { client, server, counts, cancel, task }
    }
}

/// Both ends of a connection.
pub(crate) async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    // Who is refused has nobody to wait for.
    let (dialled, (accepted, _)) = tokio::try_join!(TcpStream::connect(addr), listener.accept()).unwrap();
    for socket in [&dialled, &accepted] {
        socket.set_nodelay(true).unwrap();
    }
    (dialled, accepted)
}

fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
}

#[test]
fn bytes_are_copied_from_slices_to_spaces_of_other_sizes() {
    let (one, two) = (b"abcdef", b"ghi");
    let slices = [IoSlice::new(one), IoSlice::new(&[]), IoSlice::new(two)];
    for (first, second, expected) in [(4, 9, "abcdefghi"), (0, 3, "abc"), (9, 0, "abcdefghi"), (1, 1, "ab")] {
        let (mut left, mut right) = (vec![0; first], vec![0; second]);
        let copied = copy(&slices, &mut [IoSliceMut::new(&mut left), IoSliceMut::new(&mut right)]);
        let seen = [left, right].concat();
        assert_eq!(&seen[..copied], expected.as_bytes());
    }
}

#[tokio::test]
async fn bytes_pass_both_ways_and_are_counted_exactly() {
    let mut relayed = Relayed::start().await;
    let payload = vec![7_u8; 300_000];
    let (mut read, mut write) = relayed.client.split();
    let echo = async {
        let mut seen = vec![0; payload.len()];
        relayed.server.read_exact(&mut seen).await.unwrap();
        relayed.server.write_all(&seen).await.unwrap();
        relayed.server.shutdown().await.unwrap();
    };
    let ask = async {
        write.write_all(&payload).await.unwrap();
        write.shutdown().await.unwrap();
    };
    let mut answer = Vec::new();
    let (_, _, got) = tokio::join!(echo, ask, read.read_to_end(&mut answer));
    assert_eq!(got.unwrap(), payload.len());
    assert_eq!(relayed.task.await.unwrap(), End::Finished);
    assert_eq!(relayed.counts.0.load(Ordering::Relaxed), 300_000);
    assert_eq!(relayed.counts.1.load(Ordering::Relaxed), 300_000);
}

#[tokio::test]
async fn a_fin_closes_one_direction_only() {
    let mut relayed = Relayed::start().await;
    relayed.client.shutdown().await.unwrap();
    assert_eq!(relayed.server.read(&mut [0; 1]).await.unwrap(), 0);
    relayed.server.write_all(b"still here").await.unwrap();
    let mut seen = [0; 10];
    relayed.client.read_exact(&mut seen).await.unwrap();
    assert_eq!(&seen, b"still here");
    drop(relayed.server);
    assert_eq!(relayed.client.read(&mut [0; 1]).await.unwrap(), 0);
    assert_eq!(relayed.task.await.unwrap(), End::Finished);
}

#[tokio::test]
async fn a_reset_of_one_end_resets_the_other() {
    let mut relayed = Relayed::start().await;
    reset(relayed.client);
    let error = relayed.server.read(&mut [0; 1]).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(relayed.task.await.unwrap(), End::NearBroke);
}

#[tokio::test]
async fn a_reset_after_a_fin_is_still_a_reset() {
    let mut relayed = Relayed::start().await;
    relayed.client.shutdown().await.unwrap();
    assert_eq!(relayed.server.read(&mut [0; 1]).await.unwrap(), 0);
    reset(relayed.client);
    assert_eq!(relayed.task.await.unwrap(), End::NearBroke);
    let error = relayed.server.write_all(&[0; 1]).await.err();
    let error = match error {
        Some(error) => error,
        None => relayed.server.read(&mut [0; 1]).await.unwrap_err(),
    };
    assert!(matches!(error.kind(), std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe), "{error}");
}

#[tokio::test]
async fn a_cancelled_relay_resets_both_ends() {
    let mut relayed = Relayed::start().await;
    relayed.client.write_all(b"x").await.unwrap();
    relayed.server.read_exact(&mut [0; 1]).await.unwrap();
    relayed.cancel.cancel(CloseReason::PolicyChanged);
    assert_eq!(relayed.task.await.unwrap(), End::Cancelled(CloseReason::PolicyChanged));
    for end in [&mut relayed.client, &mut relayed.server] {
        assert_eq!(end.read(&mut [0; 1]).await.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    }
}

#[tokio::test]
async fn a_slow_reader_slows_its_writer() {
    let mut relayed = Relayed::start().await;
    let flood = async {
        let block = vec![0; 1 << 20];
        let mut written = 0_usize;
        while written < 1 << 30 {
            let Ok(wrote) = tokio::time::timeout(Duration::from_millis(500), relayed.client.write(&block)).await else { break };
            written += wrote.unwrap();
        }
        written
    };
    let written = flood.await;
    assert!(written < 64 << 20, "{written} bytes were taken although nobody reads");
    drop(relayed.server);
}

#[tokio::test]
async fn a_reset_overtakes_what_a_reader_that_has_stopped_does_not_take() {
    let mut relayed = Relayed::start().await;
    let block = vec![0; 1 << 20];
    while tokio::time::timeout(Duration::from_millis(200), relayed.client.write(&block)).await.is_ok() {}
    reset(relayed.client);
    assert_eq!(tokio::time::timeout(GRACE * 5, relayed.task).await.expect("the relay ends").unwrap(), End::NearBroke);
    let server = relayed.server;
    tokio::time::timeout(GRACE, server.ready(tokio::io::Interest::ERROR)).await.expect("the server is told").unwrap();
}

#[tokio::test]
async fn what_has_come_before_a_reset_goes_to_a_reader_that_reads_before_it() {
    let mut relayed = Relayed::start().await;
    // More than the far socket takes at once.
    let block = vec![7; 1 << 20];
    let mut written = 0;
    while let Ok(bytes) = tokio::time::timeout(Duration::from_millis(200), relayed.client.write(&block)).await {
        written += bytes.unwrap();
    }
    let counted = relayed.counts.0.load(Ordering::Relaxed);
    // A reset throws away what its own socket has not sent; what the relay's socket has received is the relay's to deliver.
    reset(relayed.client);
    let mut seen = 0;
    let kind = loop {
        match relayed.server.read(&mut vec![0; 1 << 20]).await {
            Ok(bytes) => seen += bytes as u64,
            Err(error) => break error.kind(),
        }
    };
    assert_eq!(kind, std::io::ErrorKind::ConnectionReset);
    assert!(seen >= counted && written > 0, "{seen} of {counted} bytes that were taken before the reset");
}
