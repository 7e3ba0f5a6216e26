//! Accepts TLS connections: TLS 1.3 and HTTP/2 only, with a certificate for whatever address the client dialled.
//!
//! Enters: a TCP listener. Leaves: a stream of connections past their handshake. Everything that an unauthenticated client can
//! hold is bounded in number and time.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use rustls::ServerConfig;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Sleep, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;
use tracing::{debug, error, warn};

use super::ConnectionAuth;
use crate::controller::authority::{Authority, SignError};
use crate::limits::{Antechamber, Waiting};

/// The time for a TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// The time for a connection to show a token.
const AUTHENTICATION: Duration = Duration::from_secs(15);
/// Connections that have shown no token yet.
const STRANGERS: usize = 512;
/// Connections open.
const CONNECTIONS: usize = 16_384;
/// The life of a serving certificate; it is replaced after half of it.
const CERTIFICATE: Duration = Duration::from_secs(24 * 3600);
/// Addresses that certificates are kept for.
const ADDRESSES: usize = 256;

/// A connection past its handshake.
pub(super) struct Connection {
    stream: TlsStream<TcpStream>,
    auth: ConnectionAuth,
    /// Where it waits until it has shown a token.
    stranger: Option<Stranger>,
    _place: OwnedSemaphorePermit,
}

/// What ends a connection that shows no token.
struct Stranger {
    deadline: Pin<Box<Sleep>>,
    evicted: Pin<Box<WaitForCancellationFutureOwned>>,
    _waiting: Waiting,
}

/// Serving certificates by local address.
struct ServingCertificates {
    authority: Arc<Authority>,
    names: Vec<String>,
    configs: Mutex<HashMap<IpAddr, Serving>>,
}

/// A certificate to serve with.
struct Serving {
    config: Arc<ServerConfig>,
    replace_at: SystemTime,
    /// The certificate that it is signed by: another authority means another one.
    issuer: CertificateDer<'static>,
}

/// Why there is no certificate to serve with.
#[derive(Debug, thiserror::Error)]
enum ServingError {
    #[error(transparent)]
    Sign(#[from] SignError),
    #[error("TLS does not take the serving certificate: {0}")]
    Tls(#[from] rustls::Error),
}

/// Accepts until `stop` is cancelled.
pub(super) fn accept(
    listener: TcpListener,
    names: Vec<String>,
    authority: Arc<Authority>,
    stop: CancellationToken,
) -> ReceiverStream<io::Result<Connection>> {
    let certificates = Arc::new(ServingCertificates { authority, names, configs: Mutex::default() });
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = accept_all(listener, certificates, sender) => {}
        }
    });
    ReceiverStream::new(receiver)
}

async fn accept_all(listener: TcpListener, certificates: Arc<ServingCertificates>, ready: mpsc::Sender<io::Result<Connection>>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let strangers = Antechamber::new(STRANGERS);
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let (socket, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(failure) => {
                // Out of descriptors, most likely: some will be closed in a moment.
                warn!(%failure, "cannot accept a connection");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (certificates, ready, waiting) = (Arc::clone(&certificates), ready.clone(), strangers.enter(Weak::new()));
        tokio::spawn(async move {
            let evicted = waiting.evicted();
            let stream = tokio::select! {
                stream = timeout(HANDSHAKE, shake_hands(socket, &certificates)) => stream,
                () = evicted => return debug!(%peer, "too many strangers: the one that has taken longest has to go"),
            };
            match stream {
                Ok(Ok(stream)) => {
                    let connection = Connection {
                        stream,
                        auth: ConnectionAuth::default(),
                        stranger: Some(Stranger::new(waiting)),
                        _place: place,
                    };
                    // A closed channel means that the controller stops.
                    drop(ready.send(Ok(connection)).await);
                }
                Ok(Err(failure)) => debug!(%peer, %failure, "a TLS handshake failed"),
                Err(_late) => debug!(%peer, "a TLS handshake took too long"),
            }
        });
    }
}

async fn shake_hands(socket: TcpStream, certificates: &ServingCertificates) -> io::Result<TlsStream<TcpStream>> {
    socket.set_nodelay(true)?;
    let local = socket.local_addr()?.ip().to_canonical();
    let config = certificates.config_for(local, SystemTime::now()).map_err(|failure| {
        error!("no certificate to serve with: {failure}");
        io::Error::other(failure)
    })?;
    TlsAcceptor::from(config).accept(socket).await
}

impl ServingCertificates {
    /// The TLS configuration for clients that dialled `local`.
    fn config_for(&self, local: IpAddr, now: SystemTime) -> Result<Arc<ServerConfig>, ServingError> {
        let mut configs = self.configs.lock().unwrap_or_else(PoisonError::into_inner);
        let issuer = self.authority.issuer();
        if let Some(serving) = configs.get(&local).filter(|serving| now < serving.replace_at && serving.issuer == issuer) {
            return Ok(Arc::clone(&serving.config));
        }
        let (chain, key) = self.authority.serving(&[local], &self.names, CERTIFICATE, now)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_single_cert(chain.der, PrivateKeyDer::Pkcs8(key))?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        // Agents connect seldom: state for resumption would be for strangers only.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        if configs.len() >= ADDRESSES {
            configs.clear();
        }
        let config = Arc::new(config);
        configs.insert(local, Serving { config: Arc::clone(&config), replace_at: now + CERTIFICATE / 2, issuer });
        Ok(config)
    }
}

impl Stranger {
    fn new(waiting: Waiting) -> Self {
        let deadline = Box::pin(sleep(AUTHENTICATION));
        Self { deadline, evicted: Box::pin(waiting.evicted()), _waiting: waiting }
    }

    /// Why the connection has to end; pending while it need not.
    fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<io::Error> {
        if self.deadline.as_mut().poll(context).is_ready() {
            return Poll::Ready(io::Error::new(io::ErrorKind::TimedOut, "no token was shown in time"));
        }
        self.evicted.as_mut().poll(context).map(|()| io::Error::new(io::ErrorKind::TimedOut, "too many strangers"))
    }
}

impl Connection {
    /// Why the connection has to end; pending while it need not.
    fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<io::Error> {
        if self.auth.0.load(Ordering::Relaxed) {
            self.stranger = None;
        }
        self.stranger.as_mut().map_or(Poll::Pending, |stranger| stranger.poll_end(context))
    }
}

impl Connected for Connection {
    type ConnectInfo = ConnectionAuth;

    fn connect_info(&self) -> ConnectionAuth {
        self.auth.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Poll::Ready(end) = self.poll_end(context) {
            return Poll::Ready(Err(end));
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, buffer)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        // One that reads nothing is not read from either.
        if let Poll::Ready(end) = self.poll_end(context) {
            return Poll::Ready(Err(end));
        }
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
