//! Connections between our own ends, and between ours and those of the library.

use std::future::poll_fn;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;
use crate::identity::TrustBundle;
use crate::identity::test_authority::{Issued, TestAuthority};
use crate::relay::Slices;
use crate::relay::tests::pair;
use crate::tunnel::tls::{HandshakeFault, client_config, handshake_fault, server_config, server_name};
use crate::tunnel::{handshake, verify};

const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/cart";
const SERVER: &str = "spiffe://cluster.local/ns/shop/sa/stock";
const ALPN: &[&[u8]] = &[b"test"];

/// Bytes that are all there.
pub(in crate::tunnel) struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    pub(in crate::tunnel) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }
}

impl Source for Bytes<'_> {
    fn poll_fill(&mut self, _cx: &mut Context<'_>) -> Poll<Result<Option<()>, Broken>> {
        Poll::Ready(Ok((!self.0.is_empty()).then_some(())))
    }

    fn filled<'a>(&'a self, slices: &mut Slices<'a>) {
        slices.push(self.0);
    }

    fn consume(&mut self, bytes: usize) {
        self.0 = &self.0[bytes..];
    }

    fn holds(&self) -> bool {
        !self.0.is_empty()
    }

    fn poll_broken(&mut self, _cx: &mut Context<'_>) -> Poll<Broken> {
        Poll::Pending
    }
}

type Configs = (Arc<rustls::ClientConfig>, Arc<rustls::ServerConfig>);

fn configs() -> Configs {
    let authority = TestAuthority::new("mesh");
    configs_of(&authority, &authority.leaf(CLIENT).issue(), &authority.leaf(SERVER).issue())
}

fn configs_of(authority: &TestAuthority, client: &Issued, server: &Issued) -> Configs {
    let bundle = TrustBundle::new([authority.root()]).expect("a legal root");
    let client = client_config(&client.svid(CLIENT), &bundle, vec![SERVER.parse().expect("legal")], ALPN);
    let domain = "cluster.local".parse().expect("legal");
    (client.expect("a configuration"), server_config(&server.svid(SERVER), &bundle, &domain, ALPN).expect("a configuration"))
}

/// Both ends of a connection, ours.
pub(in crate::tunnel) async fn ours() -> (TlsStream, TlsStream) {
    let (near, far) = pair().await;
    let (client, server) = configs();
    let (client, server) = tokio::join!(handshake::connect(Arc::new(near), client), handshake::accept(Arc::new(far), server));
    (client.expect("the client passes").tls, server.expect("the server passes").tls)
}

/// Sends so much both ways that keys are changed many times, and ends in order.
async fn converse<A, B>(mut one: A, mut other: B)
where
    A: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    B: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let payload: Vec<u8> = (0..3_000_000_u32).map(|place| (place / 7) as u8).collect();
    let expected = payload.clone();
    let echo = tokio::spawn(async move {
        let (mut read, mut write) = tokio::io::split(&mut other);
        tokio::io::copy(&mut read, &mut write).await.expect("whole");
        write.shutdown().await.expect("open");
    });
    let (mut read, mut write) = tokio::io::split(&mut one);
    let send = async {
        for part in payload.chunks(10_007) {
            write.write_all(part).await.expect("open");
        }
        write.flush().await.expect("open");
        write.shutdown().await.expect("open");
    };
    let mut seen = Vec::new();
    let ((), read) = tokio::join!(send, read.read_to_end(&mut seen));
    read.expect("ends in order");
    assert!(seen == expected, "{} bytes came back", seen.len());
    echo.await.expect("no panic");
}

#[tokio::test]
async fn more_than_a_buffer_behind_the_handshake_is_an_error() {
    let most = Size::Large.bytes();
    for (bytes, kept) in [(0, Ok(())), (1, Ok(())), (most, Ok(())), (most + 1, Err(Unusable::TooMuch(most + 1)))] {
        let (mut stream, _peer) = ours().await;
        assert_eq!(stream.reader.keep(&vec![0; bytes]), kept, "{bytes} bytes");
    }
}

#[tokio::test]
async fn our_two_ends_understand_each_other() {
    let (one, other) = ours().await;
    converse(one, other).await;
    let (one, other) = ours().await;
    converse(other, one).await;
}

#[tokio::test]
async fn our_client_and_the_librarys_server_understand_each_other() {
    let (near, far) = pair().await;
    let (client, server) = configs();
    let (client, server) = tokio::join!(handshake::connect(Arc::new(near), client), TlsAcceptor::from(server).accept(far));
    let client = client.expect("passes");
    assert_eq!(client.alpn.as_deref(), Some(ALPN[0]));
    assert_eq!(verify::peer_identity(&client.chain).expect("named").to_string(), SERVER);
    converse(client.tls, server.expect("passes")).await;
}

#[tokio::test]
async fn the_librarys_client_and_our_server_understand_each_other() {
    let (near, far) = pair().await;
    let (client, server) = configs();
    let (client, server) =
        tokio::join!(TlsConnector::from(client).connect(server_name(), near), handshake::accept(Arc::new(far), server));
    let (client, server) = (client.expect("passes"), server.expect("passes"));
    assert_eq!(verify::peer_identity(&server.chain).expect("named").to_string(), CLIENT);
    converse(client, server.tls).await;
}

#[tokio::test]
async fn the_librarys_change_of_keys_is_followed_and_answered() {
    let (near, far) = pair().await;
    let (client, server) = configs();
    let (client, server) =
        tokio::join!(TlsConnector::from(client).connect(server_name(), near), handshake::accept(Arc::new(far), server));
    let (mut client, mut server) = (client.expect("passes"), server.expect("passes").tls);
    for round in 0..3_u8 {
        client.get_mut().1.refresh_traffic_keys().expect("a TLS 1.3 connection");
        client.write_all(&[round; 10]).await.expect("open");
        client.flush().await.expect("open");
        let mut seen = [0; 10];
        server.read_exact(&mut seen).await.expect("whole");
        server.write_all(&seen).await.expect("open");
        server.flush().await.expect("open");
        client.read_exact(&mut seen).await.expect("whole");
        assert_eq!(seen, [round; 10]);
    }
}

#[tokio::test]
async fn what_comes_right_behind_the_handshake_is_not_lost() {
    let (near, far) = pair().await;
    let (client, server) = configs();
    let client = async {
        let mut stream = TlsConnector::from(client).connect(server_name(), near).await.expect("passes");
        stream.write_all(b"at once").await.expect("open");
        stream.flush().await.expect("open");
        stream
    };
    // The server begins when the client's last message and its first bytes are both there, or as they come: both must do.
    let (_client, server) = tokio::join!(client, handshake::accept(Arc::new(far), server));
    let mut seen = [0; 7];
    server.expect("passes").tls.read_exact(&mut seen).await.expect("whole");
    assert_eq!(&seen, b"at once");
}

#[tokio::test]
async fn a_connection_that_is_cut_has_not_ended_in_order() {
    let (client, mut server) = ours().await;
    drop(client);
    let error = server.read(&mut [0; 1]).await.expect_err("no end in order");
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

#[tokio::test]
async fn a_record_that_was_touched_is_refused() {
    let (near, far) = pair().await;
    let (middle_near, middle_far) = pair().await;
    let (client, server) = configs();
    // Passes the handshake on as it is, and changes the last byte of what comes after.
    let middle = tokio::spawn(async move {
        let (mut far, mut out) = (far, middle_near);
        let (mut far_read, mut far_write) = far.split();
        let (mut out_read, mut out_write) = out.split();
        let back = tokio::io::copy(&mut out_read, &mut far_write);
        let forth = async {
            let mut buffer = [0; 65_536];
            loop {
                let Ok(bytes @ 1..) = far_read.read(&mut buffer).await else { return };
                if bytes > 30_000 {
                    buffer[bytes - 1] ^= 1;
                }
                if out_write.write_all(&buffer[..bytes]).await.is_err() {
                    return;
                }
            }
        };
        tokio::select! { _ = back => {} () = forth => {} }
    });
    let (client, server) =
        tokio::join!(handshake::connect(Arc::new(near), client), handshake::accept(Arc::new(middle_far), server));
    let (mut client, mut server) = (client.expect("passes").tls, server.expect("passes").tls);
    let send = async {
        let _refused = client.write_all(&[7; 1_000_000]).await;
        let _refused = client.flush().await;
        std::future::pending::<()>().await;
    };
    let mut seen = Vec::new();
    let read = tokio::select! { () = send => unreachable!(), read = server.read_to_end(&mut seen) => read };
    assert_eq!(read.expect_err("touched").kind(), io::ErrorKind::InvalidData);
    assert!(seen.iter().all(|byte| *byte == 7));
    middle.abort();
}

#[tokio::test]
async fn a_refused_certificate_is_told_to_the_other_side() {
    let (mesh, other) = (TestAuthority::new("mesh"), TestAuthority::new("other"));
    let (good_client, good_server) = (mesh.leaf(CLIENT).issue(), mesh.leaf(SERVER).issue());

    let (near, far) = pair().await;
    let (client, server) = configs_of(&mesh, &good_client, &other.leaf(SERVER).issue());
    let (client, server) = tokio::join!(handshake::connect(Arc::new(near), client), handshake::accept(Arc::new(far), server));
    let (refused, told) = (client.err().expect("refused"), server.err().expect("told"));
    assert!(matches!(handshake_fault(&refused), HandshakeFault::Refused(_)), "{refused}");
    assert!(matches!(handshake_fault(&told), HandshakeFault::RefusedByPeer(_)), "{told}");

    let (near, far) = pair().await;
    let (client, server) = configs_of(&mesh, &other.leaf(CLIENT).issue(), &good_server);
    let client = async {
        // The client has finished before the server looks at its certificate.
        let mut tls = handshake::connect(Arc::new(near), client).await.expect("the server is right").tls;
        tls.read(&mut [0; 1]).await
    };
    let (told, refused) = tokio::join!(client, handshake::accept(Arc::new(far), server));
    let (refused, told) = (refused.err().expect("refused"), told.expect_err("told"));
    assert!(matches!(handshake_fault(&refused), HandshakeFault::Refused(_)), "{refused}");
    assert!(matches!(handshake_fault(&told), HandshakeFault::RefusedByPeer(_)), "{told}");
}

#[tokio::test]
async fn nonsense_for_a_handshake_is_refused_wherever_it_ends() {
    // The first eight bytes of a hello of 256, which no record here completes.
    let begun: &[u8] = &[22, 3, 1, 0, 8, 1, 0, 1, 0, 3, 3, 0, 0];
    // A hello of two bytes and one of none, in one record.
    let twice: &[u8] = &[22, 3, 1, 0, 10, 1, 0, 0, 2, 3, 3, 1, 0, 0, 0];
    for (before, after) in [
        (begun, &[23, 3, 3, 0, 1, 0][..]),
        (begun, &[21, 3, 3, 0, 2, 2, 40]),
        (begun, &[99, 3, 3, 0, 1, 0]),
        (begun, &[22, 3, 1, 0, 0]),
        (twice, &[]),
        (twice, begun),
        (&[], &[99, 3, 3, 0, 1, 0]),
    ] {
        let (mut near, far) = pair().await;
        let nonsense = [before, after].concat();
        near.write_all(&nonsense).await.expect("open");
        near.shutdown().await.expect("open");
        let refused = handshake::accept(Arc::new(far), configs().1).await.err().expect("refused");
        assert_eq!(refused.kind(), io::ErrorKind::InvalidData, "{nonsense:?}: {refused}");
    }
}

#[tokio::test]
async fn records_are_made_from_what_a_source_reads() {
    let (mut client, mut server) = ours().await;
    let payload: Vec<u8> = (0..500_000_u32).map(|place| place as u8).collect();
    let send = async {
        let mut given = Bytes::new(&payload);
        while poll_fn(|cx| client.writer.poll_move(cx, &mut given, Size::Large, |_| [9, 9])).await.expect("open") > 0 {}
        client.shutdown().await.expect("open");
    };
    let mut seen = Vec::new();
    let ((), read) = tokio::join!(send, server.read_to_end(&mut seen));
    read.expect("ends in order");
    let mut expected = Vec::new();
    for part in payload.chunks(LARGEST_PAYLOAD - 2) {
        expected.extend_from_slice(&[9, 9]);
        expected.extend_from_slice(part);
    }
    assert!(seen == expected, "{} bytes came", seen.len());
}
