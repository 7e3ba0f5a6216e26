//! The last stretch: connections that the agent opens itself, from inside a pod's network namespace.
//!
//! Enters: a fresh non-blocking socket made in the pod's namespace, and where to. Leaves: a connected stream. [`connect`] reaches the pod's
//! own application on behalf of a client, whose address the application sees; [`passthrough`] reaches, on behalf of the pod, a
//! destination that takes no tunnels.

pub mod connect;
pub mod passthrough;

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use socket2::Socket;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::model::CloseReason;

/// How long a connection may take to be made: as long as Linux takes for a SYN that nobody answers would keep a client waiting for
/// minutes, where a proxy in between can only say "no".
const TIMEOUT: Duration = Duration::from_secs(10);

/// Why a destination could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum DeliverError {
    /// Nothing listens there.
    #[error("{0} refused the connection")]
    Refused(SocketAddr),
    /// There is no way there, or no answer within 10 s.
    #[error("{destination} is unreachable: {source}")]
    Unreachable {
        /// Where to.
        destination: SocketAddr,
        /// What the network said.
        source: io::Error,
    },
    /// The socket could not be set up.
    #[error("no socket for {destination}: {source}")]
    Socket {
        /// Where to.
        destination: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
}

impl DeliverError {
    /// The word for logs and metrics.
    #[must_use]
    pub fn reason(&self) -> CloseReason {
        match self {
            Self::Refused(_) => CloseReason::DestinationRefused,
            Self::Unreachable { .. } => CloseReason::DestinationUnreachable,
            Self::Socket { .. } => CloseReason::Overloaded,
        }
    }
}

/// Connects a socket that is set up.
async fn connect_socket(socket: Socket, destination: SocketAddr) -> Result<TcpStream, DeliverError> {
    let connecting = async {
        let stream = start_connect(socket, destination)?;
        // Within a pod the handshake is mostly over by now.
        if stream.peer_addr().is_ok() {
            return Ok(stream);
        }
        stream.writable().await?;
        match stream.take_error()? {
            None => Ok(stream),
            Some(error) => Err(error),
        }
    };
    let timed_out = |_elapsed| Err(io::ErrorKind::TimedOut.into());
    timeout(TIMEOUT, connecting).await.unwrap_or_else(timed_out).map_err(|source| match source.raw_os_error() {
        Some(libc::ECONNREFUSED) => DeliverError::Refused(destination),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM | libc::EADDRNOTAVAIL) => {
            DeliverError::Socket { destination, source }
        }
        _ => DeliverError::Unreachable { destination, source },
    })
}

/// Sends the SYN. What is known at once is the error of the call; the rest shows up in the stream.
fn start_connect(socket: Socket, destination: SocketAddr) -> io::Result<TcpStream> {
    socket.set_tcp_nodelay(true)?;
    match socket.connect(&destination.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => TcpStream::from_std(socket.into()),
    }
}
