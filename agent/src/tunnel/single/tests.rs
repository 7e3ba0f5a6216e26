use std::io::IoSliceMut;

use super::*;
use crate::tunnel::tls_stream::tests::{Bytes as Given, ours};

/// Both ends of a tunnel over a real connection.
async fn tunnel() -> (Idle, Idle) {
    let (client, server) = ours().await;
    (Idle::new(client), Idle::new(server))
}

async fn chunk(source: &mut impl Source) -> Result<Option<Vec<u8>>, Broken> {
    let mut chunk = vec![0; 100_000];
    let bytes = poll_fn(|cx| source.poll_read(cx, &mut [IoSliceMut::new(&mut chunk)])).await?;
    chunk.truncate(bytes);
    Ok((bytes > 0).then_some(chunk))
}

async fn write(sink: &mut impl Sink, bytes: &[u8]) {
    let mut given = Given::new(bytes);
    while poll_fn(|cx| sink.poll_move(cx, &mut given)).await.unwrap() > 0 {}
}

async fn finish(sink: &mut impl Sink) {
    poll_fn(|cx| sink.poll_finish(cx)).await.unwrap();
}

fn wish() -> Open {
    Open::new("10.0.0.1:4000".parse().unwrap(), "10.0.0.2:80".parse().unwrap())
}

/// Opens a stream and accepts it.
async fn stream(dialler: Idle, acceptor: Idle) -> ((SingleSource, SingleSink), (SingleSource, SingleSink)) {
    let accept = async {
        let (open, source, mut sink) = acceptor.next().await.unwrap().unwrap();
        assert_eq!(open, wish());
        sink.answer(None).await.unwrap();
        (source, sink)
    };
    let wish = wish();
    let (opened, accepted) = tokio::join!(dialler.open(&wish), accept);
    (opened.unwrap().unwrap(), accepted)
}

async fn read_to_end(source: &mut SingleSource) -> Vec<u8> {
    let mut seen = Vec::new();
    while let Some(chunk) = chunk(source).await.unwrap() {
        seen.extend_from_slice(&chunk);
    }
    seen
}

#[tokio::test]
async fn a_tunnel_carries_streams_one_after_the_other() {
    let (mut dialler, mut acceptor) = tunnel().await;
    for round in 0..3_u8 {
        let ((mut near, mut near_sink), (mut far, mut far_sink)) = stream(dialler, acceptor).await;
        let payload = vec![round; 700_000];
        let send = async {
            write(&mut near_sink, &payload).await;
            finish(&mut near_sink).await;
        };
        let (seen, ()) = tokio::join!(read_to_end(&mut far), send);
        assert_eq!(seen, payload);
        write(&mut far_sink, b"thanks").await;
        finish(&mut far_sink).await;
        assert_eq!(read_to_end(&mut near).await, b"thanks");
        dialler = reunite(near, near_sink).unwrap();
        acceptor = reunite(far, far_sink).unwrap();
        assert!(dialler.quiet() && acceptor.quiet());
    }
}

#[tokio::test]
async fn a_refusal_names_its_reason_and_keeps_the_tunnel() {
    let (dialler, acceptor) = tunnel().await;
    let refuse = async {
        let (_, source, mut sink) = acceptor.next().await.unwrap().unwrap();
        sink.answer(Some(CloseReason::PolicyDenied)).await.unwrap();
        sink.refused(source).expect("nothing out of turn")
    };
    let wish = wish();
    let (opened, acceptor) = tokio::join!(dialler.open(&wish), refuse);
    let Err((reason, dialler)) = opened.unwrap() else { panic!("was granted") };
    assert_eq!(reason, CloseReason::PolicyDenied);
    stream(dialler, acceptor).await;
}

#[tokio::test]
async fn a_reset_is_no_end_of_file() {
    let (dialler, acceptor) = tunnel().await;
    let ((near, mut near_sink), (mut far, far_sink)) = stream(dialler, acceptor).await;
    near_sink.reset();
    drop((near, near_sink));
    assert!(chunk(&mut far).await.is_err());
    assert!(reunite(far, far_sink).is_none());
}

#[tokio::test]
async fn a_half_that_is_dropped_unfinished_resets_the_stream() {
    let (dialler, acceptor) = tunnel().await;
    let ((near, near_sink), (mut far, _far_sink)) = stream(dialler, acceptor).await;
    drop((near, near_sink));
    assert!(chunk(&mut far).await.is_err());
}

#[tokio::test]
async fn a_reset_after_a_fin_is_noticed_while_nothing_is_written() {
    let (dialler, acceptor) = tunnel().await;
    let ((near, mut near_sink), (mut far, mut far_sink)) = stream(dialler, acceptor).await;
    finish(&mut near_sink).await;
    assert!(chunk(&mut far).await.unwrap().is_none());
    near_sink.reset();
    drop((near, near_sink));
    poll_fn(|cx| far_sink.poll_broken(cx)).await;
}

#[tokio::test]
async fn a_fin_of_the_last_stream_is_not_taken_for_one_of_this() {
    let (dialler, acceptor) = tunnel().await;
    let ((mut near, mut near_sink), (mut far, mut far_sink)) = stream(dialler, acceptor).await;
    finish(&mut near_sink).await;
    finish(&mut far_sink).await;
    assert!(chunk(&mut near).await.unwrap().is_none() && chunk(&mut far).await.unwrap().is_none());
    let (dialler, acceptor) = (reunite(near, near_sink).unwrap(), reunite(far, far_sink).unwrap());
    let ((mut near, mut near_sink), (_far, mut far_sink)) = stream(dialler, acceptor).await;
    write(&mut far_sink, b"mine").await;
    tokio::select! {
        biased;
        _ = poll_fn(|cx| near_sink.poll_broken(cx)) => panic!("the stream is whole"),
        seen = chunk(&mut near) => assert_eq!(seen.unwrap().unwrap(), b"mine"),
    }
}

#[tokio::test]
async fn a_tunnel_that_its_dialler_drops_ends_in_order() {
    let (dialler, acceptor) = tunnel().await;
    drop(dialler);
    assert!(!matches!(acceptor.next().await, Ok(Some(_))));
}

#[tokio::test]
async fn a_stream_that_was_reset_after_its_end_gives_no_tunnel_back() {
    let (dialler, acceptor) = tunnel().await;
    let ((mut near, mut near_sink), (_far, mut far_sink)) = stream(dialler, acceptor).await;
    finish(&mut near_sink).await;
    finish(&mut far_sink).await;
    assert!(chunk(&mut near).await.unwrap().is_none());
    near_sink.reset();
    assert!(reunite(near, near_sink).is_none());
}

#[tokio::test]
async fn a_tunnel_that_is_left_idle_ends_in_order() {
    let (dialler, acceptor) = tunnel().await;
    tokio::time::pause();
    let started = tokio::time::Instant::now();
    assert!(acceptor.next().await.unwrap().is_none());
    assert_eq!(started.elapsed().as_secs(), ACCEPTED_IDLE.as_secs());
    tokio::time::resume();
    assert!(dialler.next().await.unwrap().is_none(), "no reset");
}
