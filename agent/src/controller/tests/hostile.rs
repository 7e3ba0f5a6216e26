use std::time::Duration;

use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{Mesh, pod};
use crate::proto::ADDRESS_TYPE;

/// Reads until the peer ends the connection, one way or another.
async fn ended(mut socket: impl AsyncReadExt + Unpin) {
    let end = async { while matches!(socket.read(&mut [0; 4096]).await, Ok(read) if read > 0) {} };
    tokio::time::timeout(Duration::from_secs(20), end).await.expect("the connection is ended");
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_ends_its_own_connection_and_nothing_else() {
    let mesh = Mesh::start(&[("web.yaml", pod("web", "node-a", "10.1.0.2"))]).await;
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for length in [1, 5, 6, 100, 5000, 70_000] {
        let mut bytes = vec![0; length];
        for byte in &mut bytes {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = u8::try_from(state & 0xff).unwrap();
        }
        if length == 5000 {
            // A record that claims to be a handshake.
            bytes[..5].copy_from_slice(&[22, 3, 1, 0x40, 0]);
        }
        let mut socket = TcpStream::connect(mesh.address()).await.unwrap();
        // The peer may have ended the connection before all was written.
        drop(socket.write_all(&bytes).await);
        drop(socket.shutdown().await);
        ended(socket).await;
    }
    let mut stream = mesh.discovery("node-a").await;
    assert_eq!(stream.all(ADDRESS_TYPE, &[]).await.0.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_inside_tls_ends_its_own_connection_and_nothing_else() {
    let mesh = Mesh::start(&[("web.yaml", pod("web", "node-a", "10.1.0.2"))]).await;
    for bytes in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 20_000], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff"]
    {
        let socket = TcpStream::connect(mesh.address()).await.unwrap();
        let mut stream = mesh.tls().connect(ServerName::from(mesh.address().ip()), socket).await.unwrap();
        drop(stream.write_all(bytes).await);
        drop(stream.flush().await);
        ended(stream).await;
    }
    let mut stream = mesh.discovery("node-a").await;
    assert_eq!(stream.all(ADDRESS_TYPE, &[]).await.0.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_shows_no_token_is_closed_in_time() {
    let mesh = Mesh::start(&[]).await;
    let socket = TcpStream::connect(mesh.address()).await.unwrap();
    let mut stream = mesh.tls().connect(ServerName::from(mesh.address().ip()), socket).await.unwrap();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    stream.flush().await.unwrap();
    ended(stream).await;
}
