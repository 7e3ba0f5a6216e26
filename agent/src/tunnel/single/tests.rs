use std::future::pending;
use std::io::IoSliceMut;

use super::*;
use crate::relay::tcp::split;
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
async fn stream(dialler: Idle, acceptor: Idle) -> (Box<SingleStream>, Box<SingleStream>) {
    let accept = async {
        let (open, mut stream) = acceptor.next(pending()).await.unwrap().unwrap();
        assert_eq!(open, wish());
        stream.sink.answer(None).await.unwrap();
        stream
    };
    let wish = wish();
    let (opened, accepted) = tokio::join!(dialler.open(&wish, &[]), accept);
    (opened.unwrap(), accepted)
}

/// A tunnel in which a stream, of which these were the first bytes, has just been refused.
async fn refused(first: &[u8]) -> (Idle, Idle) {
    let (dialler, acceptor) = tunnel().await;
    let refuse = async {
        let (_, mut stream) = acceptor.next(pending()).await.unwrap().unwrap();
        stream.sink.answer(Some(CloseReason::PolicyDenied)).await.unwrap();
        stream.refuse().expect("nothing out of turn")
    };
    let wish = wish();
    let (opened, acceptor) = tokio::join!(dialler.open(&wish, first), refuse);
    let Err(Unopened::Refused(reason, dialler)) = opened else { panic!("{opened:?}") };
    assert_eq!(reason, CloseReason::PolicyDenied);
    (dialler, acceptor)
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
        let (mut near, mut far) = stream(dialler, acceptor).await;
        let payload = vec![round; 700_000];
        let send = async {
            write(&mut near.sink, &payload).await;
            finish(&mut near.sink).await;
        };
        let (seen, ()) = tokio::join!(read_to_end(&mut far.source), send);
        assert_eq!(seen, payload);
        write(&mut far.sink, b"thanks").await;
        finish(&mut far.sink).await;
        assert_eq!(read_to_end(&mut near.source).await, b"thanks");
        dialler = near.end().unwrap();
        acceptor = far.end().unwrap();
        assert!(dialler.quiet() && acceptor.quiet());
    }
}

#[tokio::test]
async fn a_refusal_names_its_reason_and_keeps_the_tunnel() {
    let (dialler, acceptor) = refused(b"").await;
    stream(dialler, acceptor).await;
}

#[tokio::test]
async fn a_tunnel_whose_peer_has_begun_to_speak_out_of_turn_is_not_used_again() {
    let (dialler, acceptor) = tunnel().await;
    let refuse = async {
        let (_, mut stream) = acceptor.next(pending()).await.unwrap().unwrap();
        let early = [&frame::answer(Some(CloseReason::PolicyDenied))[..], &frame::answer(None)[..2]].concat();
        stream.sink.send(&[&early]).await.unwrap();
        stream
    };
    let wish = wish();
    let (opened, _acceptor) = tokio::join!(dialler.open(&wish, &[]), refuse);
    assert!(matches!(&opened, Err(Unopened::Cut(error)) if error.kind() == io::ErrorKind::InvalidData), "{opened:?}");
}

#[tokio::test]
async fn first_bytes_go_along_with_the_question_and_are_not_sent_twice() {
    let (dialler, acceptor) = tunnel().await;
    let payload = vec![7; 40_000];
    let mut first = Given::new(&payload);
    let mut slices = Slices::default();
    poll_fn(|cx| first.poll_fill(cx)).await.unwrap();
    first.filled(&mut slices);
    let (wish, held) = (wish(), slices.as_slice()[0].to_vec());
    let (near, far) = tokio::join!(dialler.open(&wish, &held), async {
        let (_, mut stream) = acceptor.next(pending()).await.unwrap().unwrap();
        assert!(!chunk(&mut stream.source).await.unwrap().unwrap().is_empty(), "nothing came before the answer");
        stream.sink.answer(None).await.unwrap();
        stream
    });
    let (mut near, mut far) = (near.unwrap(), far);
    let early = near.sink.early();
    assert!((1..held.len()).contains(&early), "a record takes {early}");
    let send = async {
        while poll_fn(|cx| near.sink.poll_move(cx, &mut first)).await.unwrap() > 0 {}
        finish(&mut near.sink).await;
    };
    let (rest, ()) = tokio::join!(read_to_end(&mut far.source), send);
    assert_eq!(rest, vec![7; 40_000 - early]);
}

/// A stream that was opened with first bytes, as the acceptor has it, and what its dialler gets to know when the acceptor has done this.
async fn early_and<F: Future<Output = Box<SingleStream>>>(
    act: impl FnOnce(Box<SingleStream>) -> F,
) -> (Result<Box<SingleStream>, Unopened>, Box<SingleStream>) {
    let (dialler, acceptor) = tunnel().await;
    let (wish, accept) = (wish(), async {
        let (_, mut stream) = acceptor.next(pending()).await.unwrap().unwrap();
        stream.connected().await.unwrap();
        act(stream).await
    });
    tokio::join!(dialler.open(&wish, b"question"), accept)
}

#[tokio::test]
async fn an_answer_goes_with_the_destinations_first_bytes() {
    let (near, mut far) = early_and(async |mut stream| {
        write(&mut stream.sink, b"first").await;
        stream
    })
    .await;
    let mut near = near.unwrap();
    assert!(!near.source.payload.is_empty(), "there is more in the answer's record");
    assert_eq!(chunk(&mut near.source).await.unwrap().unwrap(), b"first");
    write(&mut far.sink, b"second").await;
    assert_eq!(chunk(&mut near.source).await.unwrap().unwrap(), b"second");
}

#[tokio::test]
async fn an_answer_goes_with_the_end_of_a_destination_that_says_nothing() {
    let (near, mut far) = early_and(async |mut stream| {
        finish(&mut stream.sink).await;
        stream
    })
    .await;
    let mut near = near.unwrap();
    assert!(!near.source.payload.is_empty(), "there is more in the answer's record");
    assert!(read_to_end(&mut near.source).await.is_empty());
    write(&mut near.sink, b"question, and more").await;
    finish(&mut near.sink).await;
    assert_eq!(read_to_end(&mut far.source).await, b"question, and more");
}

#[tokio::test]
async fn an_answer_waits_for_nobody_who_is_silent() {
    let (dialler, acceptor) = tunnel().await;
    let (_application, delivery) = crate::relay::tests::pair().await;
    let silent = async {
        let (_, mut stream) = acceptor.next(pending()).await.unwrap().unwrap();
        stream.connected().await.unwrap();
        let (mut source, _sink) = split(delivery);
        poll_fn(|cx| stream.sink.poll_move(cx, &mut source)).await
    };
    let wish = wish();
    tokio::select! {
        moved = silent => panic!("{moved:?} from a destination that says nothing"),
        opened = dialler.open(&wish, b"question") => drop(opened.unwrap()),
    }
}

#[tokio::test]
async fn who_resets_a_stream_before_its_answer_says_first_that_it_was_there() {
    let (near, _far) = early_and(async |mut stream| {
        stream.sink.reset();
        drop(stream);
        tunnel().await.0.start()
    })
    .await;
    assert!(chunk(&mut near.unwrap().source).await.is_err());
}

#[tokio::test]
async fn a_refusal_forgets_the_first_bytes_and_keeps_the_tunnel() {
    let (dialler, acceptor) = refused(b"of the refused").await;
    let (mut near, mut far) = stream(dialler, acceptor).await;
    write(&mut near.sink, b"of the next").await;
    assert_eq!(chunk(&mut far.source).await.unwrap().unwrap(), b"of the next");
}

#[tokio::test]
async fn who_has_taken_leave_has_acted_on_nothing_since() {
    // It leaves before the question comes, or with the question unread, which makes its kernel reset the connection.
    for unread in [false, true] {
        let (dialler, acceptor) = tunnel().await;
        let (wish, leave) = (wish(), acceptor.next(std::future::ready(())));
        let opened = if unread {
            tokio::join!(dialler.open(&wish, b"first"), leave).0
        } else {
            assert!(leave.await.unwrap().is_none());
            dialler.open(&wish, b"first").await
        };
        assert!(matches!(opened, Err(Unopened::Cut(_))), "{opened:?}");
    }
}

#[tokio::test]
async fn of_a_tunnel_that_is_cut_nobody_knows_what_has_arrived() {
    for (first, lost) in [(&b"first"[..], true), (b"", false)] {
        let (dialler, acceptor) = tunnel().await;
        let cut = async { drop(acceptor.next(pending()).await.unwrap().unwrap()) };
        let wish = wish();
        let (opened, ()) = tokio::join!(dialler.open(&wish, first), cut);
        assert_eq!(matches!(opened, Err(Unopened::Lost(_))), lost, "{opened:?}");
        assert_eq!(matches!(opened, Err(Unopened::Cut(_))), !lost, "{opened:?}");
    }
}

#[tokio::test]
async fn a_reset_is_no_end_of_file() {
    let (dialler, acceptor) = tunnel().await;
    let (mut near, mut far) = stream(dialler, acceptor).await;
    near.sink.reset();
    drop(near);
    assert!(chunk(&mut far.source).await.is_err());
    assert!(far.end().is_none());
}

#[tokio::test]
async fn a_half_that_is_dropped_unfinished_resets_the_stream() {
    let (dialler, acceptor) = tunnel().await;
    let (near, mut far) = stream(dialler, acceptor).await;
    drop(near);
    assert!(chunk(&mut far.source).await.is_err());
}

#[tokio::test]
async fn a_reset_after_a_fin_is_noticed_while_nothing_is_written() {
    let (dialler, acceptor) = tunnel().await;
    let (mut near, mut far) = stream(dialler, acceptor).await;
    finish(&mut near.sink).await;
    assert!(chunk(&mut far.source).await.unwrap().is_none());
    near.sink.reset();
    drop(near);
    poll_fn(|cx| far.sink.poll_broken(cx)).await;
}

#[tokio::test]
async fn a_fin_of_the_last_stream_is_not_taken_for_one_of_this() {
    let (dialler, acceptor) = tunnel().await;
    let (mut near, mut far) = stream(dialler, acceptor).await;
    finish(&mut near.sink).await;
    finish(&mut far.sink).await;
    assert!(chunk(&mut near.source).await.unwrap().is_none() && chunk(&mut far.source).await.unwrap().is_none());
    let (dialler, acceptor) = (near.end().unwrap(), far.end().unwrap());
    let (mut near, mut far) = stream(dialler, acceptor).await;
    write(&mut far.sink, b"mine").await;
    tokio::select! {
        biased;
        _ = poll_fn(|cx| near.sink.poll_broken(cx)) => panic!("the stream is whole"),
        seen = chunk(&mut near.source) => assert_eq!(seen.unwrap().unwrap(), b"mine"),
    }
}

#[tokio::test]
async fn a_tunnel_that_its_dialler_drops_ends_in_order() {
    let (dialler, acceptor) = tunnel().await;
    drop(dialler);
    assert!(!matches!(acceptor.next(pending()).await, Ok(Some(_))));
}

#[tokio::test]
async fn a_stream_that_was_reset_after_its_end_gives_no_tunnel_back() {
    let (dialler, acceptor) = tunnel().await;
    let (mut near, mut far) = stream(dialler, acceptor).await;
    finish(&mut near.sink).await;
    finish(&mut far.sink).await;
    assert!(chunk(&mut near.source).await.unwrap().is_none());
    near.sink.reset();
    assert!(near.end().is_none());
}

#[tokio::test]
async fn a_tunnel_that_is_left_idle_ends_in_order() {
    let (dialler, acceptor) = tunnel().await;
    tokio::time::pause();
    let started = tokio::time::Instant::now();
    assert!(acceptor.next(pending()).await.unwrap().is_none());
    assert_eq!(started.elapsed().as_secs(), ACCEPTED_IDLE.as_secs());
    tokio::time::resume();
    assert!(dialler.next(pending()).await.unwrap().is_none(), "no reset");
}
