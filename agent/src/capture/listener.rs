//! One of the agent's listeners in a pod.
//!
//! Enters: connections that `sk_lookup` steered to it. Leaves: each with both of its addresses as the client saw them. What
//! reached the listener by its own address, which only the pod itself can know, is reset and never leaves.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};

use super::ListenerKind;
use crate::model::address::canonical;

/// How long a listener pauses when the process is out of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(20);

/// A listener of the agent's in a pod. Dropping it closes it; accepted connections live on.
#[derive(Debug)]
pub struct Listener {
    kind: ListenerKind,
    address: IpAddr,
    socket: TcpListener,
}

/// A connection that was steered to the agent.
#[derive(Debug)]
pub struct Accepted {
    /// The connection.
    pub stream: TcpStream,
    /// Where it comes from. Never IPv4-mapped.
    pub peer: SocketAddr,
    /// The address and port that were dialled. Never IPv4-mapped.
    pub local: SocketAddr,
}

impl Listener {
    pub(super) fn new(kind: ListenerKind, address: IpAddr, socket: std::net::TcpListener) -> io::Result<Self> {
        Ok(Self { kind, address, socket: TcpListener::from_std(socket)? })
    }

    /// What is steered to it.
    #[must_use]
    pub fn kind(&self) -> ListenerKind {
        self.kind
    }

    /// The pod's address that it serves.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Takes the next connection. Never fails: a connection that died in the queue is passed over, and a process that is out of
    /// descriptors waits for some.
    ///
    /// # Cancel safety
    /// No connection is lost when the future is dropped.
    pub async fn accept(&self) -> Accepted {
        loop {
            let (stream, peer) = match self.socket.accept().await {
                Ok(accepted) => accepted,
                Err(error) if is_of_the_connection(&error) => continue,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept connections for now");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            let Ok(local) = stream.local_addr().map(canonical) else { continue };
            if local.ip() == self.address {
                return Accepted { stream, peer: canonical(peer), local };
            }
            tracing::debug!(%local, "a pod dialled the agent's listener itself: reset");
            let _closed_all_the_same = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
        }
    }
}

fn is_of_the_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[tokio::test]
    async fn a_connection_to_the_pods_address_is_handed_on_with_both_ends() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        socket.set_nonblocking(true).expect("a flag");
        let dialled = socket.local_addr().expect("an address");
        let listener = Listener::new(ListenerKind::Hbone, dialled.ip(), socket).expect("a listener");
        let client = TcpStream::connect(dialled).await.expect("a connection");
        let accepted = listener.accept().await;
        assert_eq!((accepted.local, accepted.peer), (dialled, client.local_addr().expect("an address")));
    }

    #[tokio::test]
    async fn a_connection_to_the_listeners_own_address_is_reset() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        socket.set_nonblocking(true).expect("a flag");
        let dialled = socket.local_addr().expect("an address");
        let listener = Listener::new(ListenerKind::Hbone, "10.0.0.1".parse().expect("an address"), socket).expect("a listener");
        let mut client = TcpStream::connect(dialled).await.expect("a connection");
        let read = async { client.read_u8().await.expect_err("a reset").kind() };
        tokio::select! {
            kind = read => assert_eq!(kind, io::ErrorKind::ConnectionReset),
            _ = listener.accept() => panic!("the connection was handed on"),
        }
    }
}
