//! Another implementation of the tunnel (HBONE, HTTP/2 only), which believes whatever it is shown: a stranger with any certificate.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use h2::{RecvStream, SendStream, client, server};
use http::{Method, Request, Response};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::forge::Credentials;
use crate::{Namespace, http2};

/// How long a peer waits for anything.
const PATIENCE: Duration = Duration::from_secs(20);
/// The port of tunnels.
const HBONE_PORT: u16 = 15008;

/// Why a peer was not served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The connection ended, with these words of TLS or of the network.
    Connection(String),
    /// The tunnel stands, but the request was answered with this status.
    Status(u16),
}

impl<E: std::error::Error + Send + Sync + 'static> From<E> for Refused {
    fn from(error: E) -> Self {
        // HTTP/2 wraps what ended its connection.
        let mut cause: &dyn std::error::Error = &error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        Self::Connection(cause.to_string())
    }
}

/// Opens a tunnel from `namespace` to a pod's tunnel port, asks for `authority`, says `words` there and gives the whole answer.
///
/// # Errors
/// How it was refused.
///
/// # Panics
/// When the thread cannot have a runtime.
pub fn dial(
    namespace: &Namespace,
    pod: std::net::IpAddr,
    credentials: Option<Credentials>,
    authority: SocketAddr,
    words: &'static str,
) -> Result<String, Refused> {
    namespace
        .run(move || runtime().block_on(patiently(dial_here(SocketAddr::new(pod, HBONE_PORT), credentials, authority, words))))
}

/// The same, from the caller's own namespace, by any way that leads to the tunnel port.
///
/// # Errors
/// How it was refused.
///
/// # Panics
/// When the thread cannot have a runtime.
pub fn dial_by(
    way: SocketAddr,
    credentials: Option<Credentials>,
    authority: SocketAddr,
    words: &'static str,
) -> Result<String, Refused> {
    runtime().block_on(patiently(dial_here(way, credentials, authority, words)))
}

/// Opens a tunnel from `namespace` to a pod's tunnel port and in it so many streams to `authority`, and pushes up to so many bytes into
/// each, until nothing has been taken for a second. Gives how many bytes were taken in all.
///
/// # Errors
/// How it was refused.
///
/// # Panics
/// When the thread cannot have a runtime.
pub fn press(
    namespace: &Namespace,
    pod: std::net::IpAddr,
    credentials: Credentials,
    authority: SocketAddr,
    (streams, bytes): (usize, usize),
) -> Result<usize, Refused> {
    let to = SocketAddr::new(pod, HBONE_PORT);
    namespace.run(move || runtime().block_on(press_here(to, credentials, authority, (streams, bytes))))
}

/// What a gRPC server answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status, a number in decimal (gRPC, "Status codes and their use in gRPC").
    pub status: String,
    /// The message, which is empty where the status is not 0.
    pub message: Vec<u8>,
}

/// Sends one empty gRPC request from `namespace` to a controller, with a token or none, and gives the status that it is answered with.
///
/// # Errors
/// How the connection ended without a status.
///
/// # Panics
/// When the thread cannot have a runtime.
pub fn call(namespace: &Namespace, to: SocketAddr, path: &'static str, token: Option<String>) -> Result<String, Refused> {
    namespace.run(move || request(to, path, token.as_deref(), &[])).map(|answer| answer.status)
}

/// Sends one gRPC request with this message from the caller's own namespace.
///
/// # Errors
/// How the connection ended without a status.
///
/// # Panics
/// When the thread cannot have a runtime.
pub fn request(to: SocketAddr, path: &str, token: Option<&str>, message: &[u8]) -> Result<Answer, Refused> {
    runtime().block_on(patiently(request_here(to, path, token, message)))
}

/// Accepts tunnels at a pod's tunnel port, as its agent would, and echoes each stream. What became of each connection is in the list.
///
/// # Panics
/// When the port is taken.
#[must_use]
pub fn accept(namespace: &Namespace, credentials: Credentials) -> Arc<Mutex<Vec<Result<(), Refused>>>> {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&seen);
    let (ready, listening) = std::sync::mpsc::channel();
    let _serves_until_the_test_ends = namespace.spawn(move || {
        runtime().block_on(async move {
            let listener = TcpListener::bind(("::", HBONE_PORT)).await.expect("a free port");
            ready.send(()).expect("somebody waits");
            while let Ok((stream, _)) = listener.accept().await {
                let served = serve(stream, server_config(credentials.clone())).await;
                kept.lock().expect("no panic").push(served);
            }
        });
    });
    listening.recv().expect("a free port");
    seen
}

async fn patiently<T>(work: impl Future<Output = Result<T, Refused>>) -> Result<T, Refused> {
    let late = |_elapsed| Err(Refused::Connection("no answer in time".to_owned()));
    tokio::time::timeout(PATIENCE, work).await.unwrap_or_else(late)
}

async fn dial_here(
    to: SocketAddr,
    credentials: Option<Credentials>,
    authority: SocketAddr,
    words: &'static str,
) -> Result<String, Refused> {
    let (requests, driven) = handshake(to, credentials).await?;
    let request = Request::builder().method(Method::CONNECT).uri(authority.to_string()).body(())?;
    let exchange = async {
        let (response, mut sink) = requests.ready().await?.send_request(request, false)?;
        let response = response.await?;
        if !response.status().is_success() {
            return Err(Refused::Status(response.status().as_u16()));
        }
        sink.send_data(Bytes::from_static(words.as_bytes()), true)?;
        let answer = drain(&mut response.into_body()).await?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    };
    match exchange.await {
        // The connection knows better why it ended than the stream in it.
        Err(Refused::Connection(words)) => match driven.await {
            Ok(Err(error)) => Err(error.into()),
            _ => Err(Refused::Connection(words)),
        },
        answer => answer,
    }
}

async fn press_here(
    to: SocketAddr,
    credentials: Credentials,
    authority: SocketAddr,
    (streams, bytes): (usize, usize),
) -> Result<usize, Refused> {
    let (mut requests, _driven) = handshake(to, Some(credentials)).await?;
    let taken = Arc::new(AtomicUsize::new(0));
    let mut pushing = tokio::task::JoinSet::new();
    for _ in 0..streams {
        requests = requests.ready().await?;
        let request = Request::builder().method(Method::CONNECT).uri(authority.to_string()).body(())?;
        let (response, sink) = requests.send_request(request, false)?;
        let response = response.await?;
        if !response.status().is_success() {
            return Err(Refused::Status(response.status().as_u16()));
        }
        pushing.spawn(push(sink, response.into_body(), bytes, Arc::clone(&taken)));
    }
    loop {
        let before = taken.load(Ordering::Relaxed);
        tokio::time::sleep(Duration::from_secs(1)).await;
        if taken.load(Ordering::Relaxed) == before {
            return Ok(before);
        }
    }
}

/// Pushes bytes as the windows let it, and holds the stream.
async fn push(mut sink: SendStream<Bytes>, _body: RecvStream, bytes: usize, taken: Arc<AtomicUsize>) {
    const BLOCK: &[u8] = &[7; 16_384];
    for _ in 0..bytes / BLOCK.len() {
        let mut left = Bytes::from_static(BLOCK);
        while !left.is_empty() {
            sink.reserve_capacity(left.len());
            let Some(Ok(capacity)) = std::future::poll_fn(|cx| sink.poll_capacity(cx)).await else { return };
            let part = left.split_to(capacity.min(left.len()));
            taken.fetch_add(part.len(), Ordering::Relaxed);
            if sink.send_data(part, false).is_err() {
                return;
            }
        }
    }
    std::future::pending().await
}

async fn request_here(to: SocketAddr, path: &str, token: Option<&str>, message: &[u8]) -> Result<Answer, Refused> {
    let (requests, _driven) = handshake(to, None).await?;
    let mut request = Request::builder().method(Method::POST).uri(format!("https://{to}{path}"));
    request = request.header("content-type", "application/grpc").header("te", "trailers");
    if let Some(token) = token {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    let (response, mut sink) = requests.ready().await?.send_request(request.body(())?, false)?;
    sink.send_data(http2::message(message).into(), true)?;
    let response = response.await?;
    let status = |headers: &http::HeaderMap| Some(headers.get("grpc-status")?.to_str().ok()?.to_owned());
    if let Some(status) = status(response.headers()) {
        return Ok(Answer { status, message: Vec::new() });
    }
    let mut body = response.into_body();
    let message = drain(&mut body).await?;
    let status = body.trailers().await?.and_then(|trailers| status(&trailers));
    let status = status.ok_or_else(|| Refused::Connection("no status".to_owned()))?;
    Ok(Answer { status, message: message.get(http2::MESSAGE_HEAD..).unwrap_or_default().to_vec() })
}

/// Connects, and speaks HTTP/2 over TLS there. The connection is driven on a task, which gives how it ended.
async fn handshake(
    to: SocketAddr,
    credentials: Option<Credentials>,
) -> Result<(SendRequest<Bytes>, JoinHandle<Result<(), h2::Error>>), Refused> {
    let tls = TlsConnector::from(client_config(credentials, &[b"h2"]));
    let stream = tls.connect(ServerName::from(to.ip()), TcpStream::connect(to).await?).await?;
    let (requests, connection) = client::handshake(stream).await?;
    Ok((requests, tokio::spawn(connection)))
}

async fn serve(stream: TcpStream, config: Arc<ServerConfig>) -> Result<(), Refused> {
    let mut connection = server::handshake(TlsAcceptor::from(config).accept(stream).await?).await?;
    while let Some(request) = connection.accept().await {
        let (request, mut respond) = request?;
        let sink = respond.send_response(Response::new(()), false)?;
        tokio::spawn(echo(request.into_body(), sink));
    }
    Ok(())
}

async fn echo(mut body: RecvStream, mut sink: SendStream<Bytes>) {
    // Little enough to be in one window.
    if let Ok(words) = drain(&mut body).await {
        let _gone = sink.send_data(words.into(), true);
    }
}

async fn drain(body: &mut RecvStream) -> Result<Vec<u8>, h2::Error> {
    let mut all = Vec::new();
    while let Some(chunk) = body.data().await.transpose()? {
        all.extend_from_slice(&chunk);
    }
    Ok(all)
}

/// TLS that shows these credentials, or none, to whatever server there is.
pub(crate) fn client_config(credentials: Option<Credentials>, alpn: &[&[u8]]) -> Arc<ClientConfig> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider)).with_protocol_versions(&[&rustls::version::TLS13]);
    let builder = builder.expect("TLS 1.3 is there").dangerous().with_custom_certificate_verifier(Arc::new(Anybody(provider)));
    let mut config = match credentials {
        Some(Credentials { chain, key }) => builder.with_client_auth_cert(chain, key).expect("a certificate and its key"),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Arc::new(config)
}

fn server_config(Credentials { chain, key }: Credentials) -> Arc<ServerConfig> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_protocol_versions(&[&rustls::version::TLS13]);
    let builder = builder.expect("TLS 1.3 is there").with_client_cert_verifier(Arc::new(Anybody(provider)));
    let mut config = builder.with_single_cert(chain, key).expect("a certificate and its key");
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// Believes everybody.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("only TLS 1.3 is spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Anybody {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("only TLS 1.3 is spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
