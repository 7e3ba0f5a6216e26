//! The dialling side's handshake: a connected socket becomes a tunnel to the workload that was meant, or nothing.

use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::ClientConfig;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::verify::peer_expiry;
use super::{HANDSHAKE_TIMEOUT, Tunnel, TunnelError, handshake, hbone, single, tune};
use crate::model::PeerAddr;

/// Whom a tunnel must lead to, and under which certificate: [`super::tls::client_config`] makes it.
pub type Setup = Arc<ClientConfig>;

/// A tunnel to the workload that was meant.
pub struct Dialled {
    /// When the certificate ends that the workload has proved itself with: what it proves, it proves until then.
    pub expires: SystemTime,
    /// Its streams.
    pub tunnel: Tunnel,
}

/// Authenticates both sides and starts the tunnel. Whom the peer must be is in `config`.
///
/// # Errors
/// [`TunnelError::Handshake`] when the peer is somebody else, does not accept our certificate or speaks no TLS 1.3;
/// [`TunnelError::TimedOut`] after [`HANDSHAKE_TIMEOUT`]; [`TunnelError::Broken`] when it does not speak the tunnel's protocol.
///
/// # Cancel safety
/// Dropped before it ends, it closes the connection.
pub async fn handshake(stream: TcpStream, peer: PeerAddr, config: Setup) -> Result<Dialled, TunnelError> {
    let peer = peer.0;
    tune(&stream).map_err(|source| TunnelError::Connect { peer, source })?;
    let connecting = async {
        let established =
            handshake::connect(Arc::new(stream), config).await.map_err(|source| TunnelError::Handshake { peer, source })?;
        let expires = peer_expiry(&established.chain)
            .map_err(|fault| TunnelError::Handshake { peer, source: io::Error::other(fault.to_string()) })?;
        let tunnel = if established.alpn.as_deref() == Some(single::ALPN) {
            Tunnel::Single(single::Idle::new(established.tls))
        } else {
            Tunnel::Hbone(hbone::Outbound::start(established.tls).await?)
        };
        Ok(Dialled { expires, tunnel })
    };
    timeout(HANDSHAKE_TIMEOUT, connecting).await.map_err(|_elapsed| TunnelError::TimedOut { peer })?
}
