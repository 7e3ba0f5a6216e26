//! Tunnels between agents: mutual TLS connections that carry captured connections as streams.
//!
//! Enters: a connected socket, this workload's SVID, and who the peer is meant to be. Leaves: streams, as endpoints for the
//! relay. The peer is authenticated before any byte of an application moves; what form the streams take on the wire is chosen by
//! ALPN, among those that the operator leaves open ([`TunnelForm`]), and stays inside this module.

pub mod accept;
pub mod dial;
mod handshake;
pub mod hbone;
pub mod pool;
mod record;
pub mod single;
pub mod stream;
pub mod tls;
mod tls_stream;
pub mod verify;

use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;
use std::{fmt, io};

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

use crate::model::CloseReason;

pub use stream::Stream;

/// How long a TLS handshake may take, on either side.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long an accepted tunnel is kept that carries nothing: longer than the dialling side keeps it ([`pool`]), which knows better
/// whether it will be wanted.
const ACCEPTED_IDLE: Duration = Duration::from_secs(120);

/// Which forms this agent offers and takes for its tunnels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TunnelForm {
    /// The single form with peers that speak it too, HBONE with all others.
    #[default]
    Auto,
    /// HBONE with every peer: for networks that inspect what passes and let only HTTP/2 through, and to tell whether a fault is the
    /// form's.
    Hbone,
}

impl TunnelForm {
    /// The names of all values.
    pub const NAMES: [&str; 2] = ["auto", "hbone"];

    /// The ALPN protocols, the preferred one first.
    #[must_use]
    pub fn alpn(self) -> &'static [&'static [u8]] {
        match self {
            Self::Auto => &[single::ALPN, hbone::ALPN],
            Self::Hbone => &[hbone::ALPN],
        }
    }
}

impl FromStr for TunnelForm {
    type Err = UnknownForm;

    fn from_str(name: &str) -> Result<Self, UnknownForm> {
        match name {
            "auto" => Ok(Self::Auto),
            "hbone" => Ok(Self::Hbone),
            _ => Err(UnknownForm(name.to_owned())),
        }
    }
}

impl fmt::Display for TunnelForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Hbone => "hbone",
        })
    }
}

/// No form has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a form of tunnels: use auto or hbone")]
pub struct UnknownForm(String);

/// A tunnel that has just been made, in the form that both sides chose.
#[derive(Debug)]
pub enum Tunnel {
    /// Carries many streams at once.
    Hbone(hbone::Outbound),
    /// Carries one stream at a time.
    Single(single::Idle),
}

/// Why a stream could not be opened, or a tunnel not be made.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// There is no way to the peer's agent, or it does not listen.
    #[error("no tunnel to {peer}: {source}")]
    Connect {
        /// The peer.
        peer: SocketAddr,
        /// What the network said.
        source: io::Error,
    },
    /// The peer did not answer in time.
    #[error("no tunnel to {peer}: no answer within {HANDSHAKE_TIMEOUT:?}")]
    TimedOut {
        /// The peer.
        peer: SocketAddr,
    },
    /// The peer had not proved who it is when its place was needed for another.
    #[error("no tunnel with {peer}: too many peers are about to shake hands, and it had to make room for another")]
    Crowded {
        /// The peer.
        peer: SocketAddr,
    },
    /// The certificates of one side did not satisfy the other, or the peer speaks no TLS 1.3.
    #[error("no tunnel with {peer}: {}", tls::in_words(source))]
    Handshake {
        /// The peer.
        peer: SocketAddr,
        /// What TLS said.
        source: io::Error,
    },
    /// This workload has no certificate.
    #[error("no tunnel: {0}")]
    NoIdentity(String),
    /// TLS could not be set up from this workload's certificate.
    #[error("no tunnel: {0}")]
    Config(#[from] tls::TlsError),
    /// The tunnel broke while a stream was being opened.
    #[error("the tunnel broke: {0}")]
    Broken(#[from] h2::Error),
    /// The tunnel was cut while a stream was being opened, or the peer spoke out of turn.
    #[error("the tunnel was cut: {}", tls::in_words(.0))]
    Cut(#[source] io::Error),
    /// The tunnel was cut when the stream's first bytes had been sent: they may have been acted upon, and are not sent again.
    #[error("the tunnel was cut when the first bytes had been sent, which may have arrived: {}", tls::in_words(.0))]
    Lost(#[source] io::Error),
    /// The connection that the stream was for has been reset by who made it.
    #[error("the source has reset the connection: {0}")]
    Abandoned(#[source] io::Error),
    /// The peer answered, and refused the stream.
    #[error("the destination's agent refused the connection: {reason}")]
    Refused {
        /// The reason that it gave.
        reason: CloseReason,
    },
}

impl TunnelError {
    /// The word for logs and metrics.
    #[must_use]
    pub fn reason(&self) -> CloseReason {
        match self {
            Self::Connect { .. } | Self::TimedOut { .. } => CloseReason::DestinationUnreachable,
            Self::Handshake { .. } => CloseReason::PeerNotAuthenticated,
            // A server's refusal comes after the client's own handshake is complete.
            Self::Cut(error) if tls::refused_by_peer(error) => CloseReason::PeerNotAuthenticated,
            Self::Broken(error) if error.get_io().is_some_and(tls::refused_by_peer) => CloseReason::PeerNotAuthenticated,
            Self::Crowded { .. } => CloseReason::Overloaded,
            Self::NoIdentity(_) | Self::Config(_) => CloseReason::NoIdentity,
            Self::Broken(_) | Self::Cut(_) | Self::Lost(_) => CloseReason::TunnelFailed,
            Self::Abandoned(_) => CloseReason::SourceReset,
            Self::Refused { reason } => *reason,
        }
    }
}

/// Sets up a socket that carries a tunnel: no delay, and a peer that vanished is noticed within about 30 s.
///
/// # Errors
/// What the kernel says; only for a socket that is already gone.
pub fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    let probes = TcpKeepalive::new().with_time(Duration::from_secs(15)).with_interval(Duration::from_secs(5)).with_retries(3);
    socket.set_tcp_keepalive(&probes)?;
    socket.set_tcp_user_timeout(Some(Duration::from_secs(30)))
}
