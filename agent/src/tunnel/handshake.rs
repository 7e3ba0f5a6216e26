//! The TLS handshake of a tunnel, driven over its socket.
//!
//! Enters: a connected socket and rustls' configuration of one side. Leaves: who the peer is, the protocol agreed on, and the two
//! directions of the connection with their keys. rustls is given one record after the other and no byte more: what the peer sends
//! behind its last handshake message is for the tunnel's own reader.

use std::io;
use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::kernel::KernelConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus};
use rustls::{ClientConfig, CommonState, ExtractedSecrets, ServerConfig};
use rustls_pki_types::CertificateDer;
use tokio::net::TcpStream;

use super::record;
use super::tls::server_name;
use super::tls_stream::{Kernel, TlsStream};

/// The most bytes of a handshake that wait for the rest of their message: certificate chains are the longest.
const LARGEST_FLIGHT: usize = 128 * 1024;

/// A connection whose two sides know each other.
pub(super) struct Established {
    /// The connection.
    pub(super) tls: TlsStream,
    /// The protocol agreed on.
    pub(super) alpn: Option<Vec<u8>>,
    /// The peer's certificates, verified, the leaf first.
    pub(super) chain: Vec<CertificateDer<'static>>,
}

/// Shakes hands as the client.
///
/// # Errors
/// The connection's, or rustls' as the error's source; the peer has been told by then.
pub(super) async fn connect(stream: Arc<TcpStream>, config: Arc<ClientConfig>) -> io::Result<Established> {
    drive(stream, UnbufferedClientConnection::new(config, server_name()).map_err(refused)?).await
}

/// Shakes hands as the server.
///
/// # Errors
/// As [`connect`].
pub(super) async fn accept(stream: Arc<TcpStream>, config: Arc<ServerConfig>) -> io::Result<Established> {
    drive(stream, UnbufferedServerConnection::new(config).map_err(refused)?).await
}

/// What has to happen next.
enum Step {
    /// Nothing: go on.
    Continue,
    /// The peer must be heard.
    Read,
    /// Nothing more: both sides have finished.
    Done,
}

/// Either side of a handshake.
trait Handshake: Sized {
    /// Takes the records in `incoming`, and appends to `outgoing` what is to be sent. Also says how many bytes of `incoming` are
    /// spent.
    fn step(&mut self, incoming: &mut [u8], outgoing: &mut Vec<u8>) -> (usize, Result<Step, rustls::Error>);

    fn state(&self) -> &CommonState;

    fn keys(self) -> Result<(ExtractedSecrets, Kernel), rustls::Error>;
}

async fn drive(stream: Arc<TcpStream>, mut side: impl Handshake) -> io::Result<Established> {
    let (mut incoming, mut outgoing) = (Vec::with_capacity(4096), Vec::with_capacity(4096));
    // So many bytes of `incoming` have been shown to rustls.
    let mut shown = 0;
    loop {
        let (spent, step) = side.step(&mut incoming[..shown], &mut outgoing);
        incoming.drain(..spent);
        shown -= spent;
        match step {
            Ok(Step::Continue) => {}
            Ok(Step::Done) => break,
            Ok(Step::Read) => {
                send(&stream, &outgoing).await?;
                outgoing.clear();
                shown += next_record(&stream, &mut incoming, shown).await?;
            }
            Err(error) => {
                tell(&stream, &mut side, outgoing).await;
                return Err(refused(error));
            }
        }
    }
    send(&stream, &outgoing).await?;
    let state = side.state();
    let alpn = state.alpn_protocol().map(<[u8]>::to_vec);
    let chain = state.peer_certificates().unwrap_or_default().to_vec();
    let (secrets, kernel) = side.keys().map_err(refused)?;
    let tls = TlsStream::new(stream, &secrets, kernel, &incoming[shown..]).map_err(io::Error::other)?;
    Ok(Established { tls, alpn, chain })
}

/// Waits for a whole record behind the first `shown` bytes, and says how long it is.
async fn next_record(stream: &TcpStream, incoming: &mut Vec<u8>, shown: usize) -> io::Result<usize> {
    loop {
        if let Some(length) = record::length(&incoming[shown..])?
            && incoming.len() >= shown + length
        {
            return Ok(length);
        }
        if incoming.len() > LARGEST_FLIGHT {
            return Err(record::invalid(format_args!("a handshake message of more than {LARGEST_FLIGHT} bytes")));
        }
        stream.readable().await?;
        match stream.try_read_buf(incoming) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            Ok(_) | Err(_) => {}
        }
    }
}

/// Sends all of it.
async fn send(stream: &TcpStream, mut outgoing: &[u8]) -> io::Result<()> {
    while !outgoing.is_empty() {
        stream.writable().await?;
        match stream.try_write(outgoing) {
            Ok(sent) => outgoing = &outgoing[sent..],
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            Err(_) => {}
        }
    }
    Ok(())
}

/// Sends what rustls has to say about an error: an alert, if any.
async fn tell(stream: &TcpStream, side: &mut impl Handshake, mut outgoing: Vec<u8>) {
    // What waits to be sent is given before any record is looked at. Without it rustls would go on in records that are not there.
    while side.state().wants_write() && side.step(&mut [], &mut outgoing).1.is_ok() {}
    // The connection ends in any case.
    let _gone = send(stream, &outgoing).await;
}

fn refused(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// What a state of rustls' asks for.
#[expect(clippy::wildcard_enum_match_arm, reason = "the library's enum grows; nothing else belongs in a handshake")]
fn act<Data>(state: ConnectionState<'_, '_, Data>, outgoing: &mut Vec<u8>) -> Result<Step, rustls::Error> {
    match state {
        ConnectionState::EncodeTlsData(mut data) => encode(&mut data, outgoing).map(|()| Step::Continue),
        ConnectionState::TransmitTlsData(data) => {
            // It is sent when the peer must be heard, or at the end.
            data.done();
            Ok(Step::Continue)
        }
        ConnectionState::BlockedHandshake => Ok(Step::Read),
        ConnectionState::WriteTraffic(_) => Ok(Step::Done),
        _ => Err(rustls::Error::HandshakeNotComplete),
    }
}

fn encode<Data>(data: &mut EncodeTlsData<'_, Data>, outgoing: &mut Vec<u8>) -> Result<(), rustls::Error> {
    let start = outgoing.len();
    let room = match data.encode(&mut []) {
        Err(EncodeError::InsufficientSize(needed)) => needed.required_size,
        Err(EncodeError::AlreadyEncoded) | Ok(_) => return Ok(()),
    };
    outgoing.resize(start + room, 0);
    let encoded = data.encode(&mut outgoing[start..]).map_err(|error| rustls::Error::General(error.to_string()))?;
    outgoing.truncate(start + encoded);
    Ok(())
}

/// Both sides' types have the same methods, but share no trait.
macro_rules! side {
    ($connection:ty, $kernel:expr) => {
        impl Handshake for $connection {
            fn step(&mut self, incoming: &mut [u8], outgoing: &mut Vec<u8>) -> (usize, Result<Step, rustls::Error>) {
                let UnbufferedStatus { discard, state, .. } = self.process_tls_records(incoming);
                let step = state.and_then(|state| act(state, outgoing));
                let waits = matches!(step, Ok(Step::Done)) && self.is_handshaking();
                // A server may write before the client has proved itself. Ours does not.
                (discard, if waits { Ok(Step::Read) } else { step })
            }

            fn state(&self) -> &CommonState {
                self
            }

            fn keys(self) -> Result<(ExtractedSecrets, Kernel), rustls::Error> {
                let (secrets, kernel): (ExtractedSecrets, KernelConnection<_>) = self.dangerous_into_kernel_connection()?;
                Ok((secrets, $kernel(kernel)))
            }
        }
    };
}
side!(UnbufferedClientConnection, Kernel::Client);
side!(UnbufferedServerConnection, Kernel::Server);
