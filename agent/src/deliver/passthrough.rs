//! To a destination that takes no tunnels, as the pod itself would: its own address as source, nothing added.

use std::net::SocketAddr;

use socket2::Socket;
use tokio::net::TcpStream;

use super::{DeliverError, connect_socket};

/// Connects `socket`, made in the pod's namespace, to `destination`.
///
/// # Errors
/// [`DeliverError::Refused`], [`DeliverError::Unreachable`] or [`DeliverError::Socket`].
pub async fn connect(socket: Socket, destination: SocketAddr) -> Result<TcpStream, DeliverError> {
    connect_socket(socket, destination).await
}
