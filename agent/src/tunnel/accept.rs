//! The accepting side's handshake: a connection to the tunnel port becomes a tunnel from an authenticated peer, or nothing.

use std::sync::Arc;
use std::time::SystemTime;

use rustls::ServerConfig;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::verify::{PeerFault, peer_expiry, peer_identity};
use super::{HANDSHAKE_TIMEOUT, TunnelError, handshake, hbone, single, tune};
use crate::model::{PeerAddr, SpiffeId};

/// A tunnel that a peer opened.
pub struct Accepted {
    /// Who the peer's workload is, from its verified certificate chain.
    pub source: SpiffeId,
    /// When the certificate that proves it ends.
    pub expires: SystemTime,
    /// Its streams.
    pub tunnel: Form,
}

/// An accepted tunnel's form.
pub enum Form {
    /// Carries many streams at once.
    Hbone(Box<hbone::Inbound>),
    /// Carries one stream at a time.
    Single(single::Idle),
}

/// Authenticates both sides and starts the tunnel. Who may come is in `config`.
///
/// # Errors
/// As [`dial::handshake`](super::dial::handshake).
///
/// # Cancel safety
/// Dropped before it ends, it closes the connection.
pub async fn handshake(stream: Arc<TcpStream>, peer: PeerAddr, config: Arc<ServerConfig>) -> Result<Accepted, TunnelError> {
    let peer = peer.0;
    tune(&stream).map_err(|source| TunnelError::Connect { peer, source })?;
    let accepting = async {
        let established = handshake::accept(stream, config).await.map_err(|source| TunnelError::Handshake { peer, source })?;
        let unnamed = |fault: PeerFault| TunnelError::Handshake { peer, source: std::io::Error::other(fault.to_string()) };
        let source = peer_identity(&established.chain).map_err(unnamed)?;
        let expires = peer_expiry(&established.chain).map_err(unnamed)?;
        let tunnel = if established.alpn.as_deref() == Some(single::ALPN) {
            Form::Single(single::Idle::new(established.tls))
        } else {
            Form::Hbone(Box::new(hbone::Inbound::start(established.tls).await?))
        };
        Ok(Accepted { source, expires, tunnel })
    };
    timeout(HANDSHAKE_TIMEOUT, accepting).await.map_err(|_elapsed| TunnelError::TimedOut { peer })?
}
