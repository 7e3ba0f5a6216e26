//! The accepting side's handshake: a connection to the tunnel port becomes a tunnel from an authenticated peer, or nothing.

use std::sync::Arc;

use rustls::ServerConfig;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::verify::peer_identity;
use super::{HANDSHAKE_TIMEOUT, TunnelError, hbone, single, tune};
use crate::model::{PeerAddr, SpiffeId};

/// A tunnel that a peer opened.
pub struct Accepted {
    /// Who the peer's workload is, from its verified certificate chain.
    pub source: SpiffeId,
    /// Its streams.
    pub tunnel: Form,
}

/// An accepted tunnel's form.
pub enum Form {
    /// Carries many streams at once.
    Hbone(hbone::Inbound<TlsStream<TcpStream>>),
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
pub async fn handshake(stream: TcpStream, peer: PeerAddr, config: Arc<ServerConfig>) -> Result<Accepted, TunnelError> {
    let peer = peer.0;
    tune(&stream).map_err(|source| TunnelError::Connect { peer, source })?;
    let accepting = async {
        let tls = TlsAcceptor::from(config).accept(stream).await.map_err(|source| TunnelError::Handshake { peer, source })?;
        let chain = tls.get_ref().1.peer_certificates().unwrap_or_default();
        let source = peer_identity(chain)
            .map_err(|error| TunnelError::Handshake { peer, source: std::io::Error::other(error.to_string()) })?;
        let tunnel = if tls.get_ref().1.alpn_protocol() == Some(single::ALPN) {
            Form::Single(single::Idle::new(tls.into()))
        } else {
            Form::Hbone(hbone::Inbound::start(tls).await?)
        };
        Ok(Accepted { source, tunnel })
    };
    timeout(HANDSHAKE_TIMEOUT, accepting).await.map_err(|_elapsed| TunnelError::TimedOut { peer })?
}
