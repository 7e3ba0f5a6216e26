use std::sync::Arc;

use rcgen::{CertificateParams, KeyPair};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::{PrivateKeyDer, ServerName};
use tokio::net::TcpListener;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;

/// Both ends of a tunnel over a real connection.
async fn tunnel() -> (Idle, Idle) {
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["peer".to_owned()]).unwrap().self_signed(&key).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificate.der().clone()).unwrap();
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let server = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions().unwrap();
    let mut server = server.with_no_client_auth().with_single_cert(vec![certificate.der().clone()], key).unwrap();
    server.send_tls13_tickets = 0;
    let client = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let client = client.with_root_certificates(roots).with_no_client_auth();

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dialled = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (accepted, _) = listener.accept().await.unwrap();
    let name = ServerName::try_from("peer").unwrap();
    let (client, server) = tokio::join!(
        TlsConnector::from(Arc::new(client)).connect(name, dialled),
        TlsAcceptor::from(Arc::new(server)).accept(accepted),
    );
    (Idle::new(client.unwrap().into()), Idle::new(server.unwrap().into()))
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
    while let Some(chunk) = source.chunk().await.unwrap() {
        seen.extend_from_slice(&chunk);
    }
    seen
}

#[tokio::test]
async fn a_tunnel_carries_streams_one_after_the_other() {
    let (mut dialler, mut acceptor) = tunnel().await;
    for round in 0..3_u8 {
        let ((mut near, mut near_sink), (mut far, mut far_sink)) = stream(dialler, acceptor).await;
        let payload = Bytes::from(vec![round; 700_000]);
        let send = async {
            near_sink.write(payload.clone()).await.unwrap();
            near_sink.finish().await.unwrap();
        };
        let (seen, ()) = tokio::join!(read_to_end(&mut far), send);
        assert_eq!(seen, payload);
        far_sink.write(Bytes::from_static(b"thanks")).await.unwrap();
        far_sink.finish().await.unwrap();
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
        sink.refused(source)
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
    assert!(far.chunk().await.is_err());
    assert!(reunite(far, far_sink).is_none());
}

#[tokio::test]
async fn a_half_that_is_dropped_unfinished_resets_the_stream() {
    let (dialler, acceptor) = tunnel().await;
    let ((near, near_sink), (mut far, _far_sink)) = stream(dialler, acceptor).await;
    drop((near, near_sink));
    assert!(far.chunk().await.is_err());
}

#[tokio::test]
async fn a_reset_after_a_fin_is_noticed_while_nothing_is_written() {
    let (dialler, acceptor) = tunnel().await;
    let ((near, mut near_sink), (mut far, mut far_sink)) = stream(dialler, acceptor).await;
    near_sink.finish().await.unwrap();
    assert!(far.chunk().await.unwrap().is_none());
    near_sink.reset();
    drop((near, near_sink));
    far_sink.broken().await;
}

#[tokio::test]
async fn a_fin_of_the_last_stream_is_not_taken_for_one_of_this() {
    let (dialler, acceptor) = tunnel().await;
    let ((mut near, mut near_sink), (mut far, mut far_sink)) = stream(dialler, acceptor).await;
    near_sink.finish().await.unwrap();
    far_sink.finish().await.unwrap();
    assert!(near.chunk().await.unwrap().is_none() && far.chunk().await.unwrap().is_none());
    let (dialler, acceptor) = (reunite(near, near_sink).unwrap(), reunite(far, far_sink).unwrap());
    let ((mut near, mut near_sink), (_far, mut far_sink)) = stream(dialler, acceptor).await;
    far_sink.write(Bytes::from_static(b"mine")).await.unwrap();
    tokio::select! {
        biased;
        _ = near_sink.broken() => panic!("the stream is whole"),
        chunk = near.chunk() => assert_eq!(chunk.unwrap().unwrap(), &b"mine"[..]),
    }
}

#[tokio::test]
async fn a_tunnel_that_its_dialler_drops_ends_in_order() {
    let (dialler, acceptor) = tunnel().await;
    drop(dialler);
    assert!(!matches!(acceptor.next().await, Ok(Some(_))));
}
