//! The way to the controller: gRPC over TLS 1.3, verified against the `--root-cert` file and authorised by the `--token-file`.
//!
//! Enters: the controller's address and the paths of the two files, which are read anew at each connect and each request, so that
//! a rotated root or token needs no restart. Leaves: a tonic channel, and failures in words. It never connects without verifying
//! the controller's certificate, and never sends the token before that.

use std::error::Error;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::client::WebPkiServerVerifier;
use rustls::{CertificateError, ClientConfig, RootCertStore};
use rustls_pki_types::ServerName;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use super::bundle::{BundleError, certificates_in};
use super::provider::provider;

/// How long TCP and TLS to the controller may take together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// With [`KEEPALIVE_TIMEOUT`]: a controller that is gone without a word is noticed in 15 s.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// A token or root file that is longer is not one.
const FILE_LIMIT: u64 = 1 << 20;

/// Where the controller is, and what proves either side to the other.
#[derive(Clone, Debug)]
pub struct ControllerEndpoint {
    uri: Uri,
    host: Arc<str>,
    port: u16,
    name: ServerName<'static>,
    root_cert: Arc<Path>,
    token_file: Arc<Path>,
}

/// Why a text is not a controller's address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{url}` is not the address of a controller: {reason}; write https://HOST:PORT, with an IPv6 address in brackets")]
pub struct EndpointError {
    url: String,
    reason: String,
}

/// Why there is no connection to the controller.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// A file is missing or cannot be read.
    #[error("cannot read the {what} `{}`: {source}", path.display())]
    File {
        /// What the file is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The root file has no usable root.
    #[error("the root certificate file `{}` is unusable: {source}", path.display())]
    Root {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        source: BundleError,
    },
    /// The root file's content was not taken by the TLS library.
    #[error("the root certificate file `{}` is unusable: {reason}", path.display())]
    RootRefused {
        /// The file.
        path: PathBuf,
        /// What the library says.
        reason: String,
    },
    /// The token file is empty, too long or not text.
    #[error("the token file `{}` holds no token: one line of printable ASCII was expected", path.display())]
    Token {
        /// The file.
        path: PathBuf,
    },
    /// The host name has no address.
    #[error("no address is known for the controller's name `{host}`: {source}")]
    Name {
        /// The name.
        host: Arc<str>,
        /// What the resolver says.
        source: io::Error,
    },
    /// Nothing listens there.
    #[error("connection refused at {host}:{port}: the controller is not running, or listens elsewhere")]
    Refused {
        /// The controller's host.
        host: Arc<str>,
        /// The controller's port.
        port: u16,
    },
    /// TCP failed in another way.
    #[error("cannot connect to {host}:{port}: {source}")]
    Tcp {
        /// The controller's host.
        host: Arc<str>,
        /// The controller's port.
        port: u16,
        /// What the system says.
        source: io::Error,
    },
    /// No answer in time.
    #[error("no answer from {host}:{port} within {} s", CONNECT_TIMEOUT.as_secs())]
    Timeout {
        /// The controller's host.
        host: Arc<str>,
        /// The controller's port.
        port: u16,
    },
    /// The controller's certificate does not verify.
    #[error(
        "the certificate of {host}:{port} does not verify against `{}`: {fault}; is it the root of this controller?",
        root.display()
    )]
    Certificate {
        /// The controller's host.
        host: Arc<str>,
        /// The controller's port.
        port: u16,
        /// The root file.
        root: PathBuf,
        /// What does not hold.
        fault: CertificateError,
    },
    /// The TLS handshake failed in another way.
    #[error("the TLS handshake with {host}:{port} failed: {source}")]
    Tls {
        /// The controller's host.
        host: Arc<str>,
        /// The controller's port.
        port: u16,
        /// What the TLS library says.
        source: io::Error,
    },
}

impl ControllerEndpoint {
    /// The controller at `url` (`https://HOST:PORT`, the host an IP address or a DNS name), trusted by the roots in the file
    /// `root_cert`, to which the token in `token_file` is shown.
    ///
    /// # Errors
    /// [`EndpointError`] when `url` has another form. The files are not looked at yet.
    pub fn new(url: &str, root_cert: &Path, token_file: &Path) -> Result<Self, EndpointError> {
        let reject = |reason: String| EndpointError { url: url.to_owned(), reason };
        let uri: Uri = url.parse().map_err(|error: http::uri::InvalidUri| reject(error.to_string()))?;
        if uri.scheme_str() != Some("https") {
            return Err(reject("its scheme is not https".to_owned()));
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(reject("it has a path".to_owned()));
        }
        if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
            return Err(reject("it has a user name".to_owned()));
        }
        let (Some(host), Some(port)) = (uri.host(), uri.port_u16()) else {
            return Err(reject("it has no host or no port".to_owned()));
        };
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let name = ServerName::try_from(host.clone()).map_err(|error| reject(error.to_string()))?;
        Ok(Self { uri, host: host.into(), port, name, root_cert: root_cert.into(), token_file: token_file.into() })
    }

    /// The controller's address, as `HOST:PORT`.
    pub(crate) fn address(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    /// The file of the roots.
    #[must_use]
    pub fn root_cert(&self) -> &Path {
        &self.root_cert
    }

    /// A channel that is connected.
    ///
    /// # Errors
    /// The cause in words; see [`in_words`].
    pub(crate) async fn connect(&self) -> Result<Channel, tonic::transport::Error> {
        self.settings().connect_with_connector(self.clone()).await
    }

    /// A channel that connects when it is used, and again after each failure. Needs a tokio runtime.
    pub(crate) fn connect_lazily(&self) -> Channel {
        self.settings().connect_with_connector_lazy(self.clone())
    }

    /// Puts the token into a request's metadata.
    ///
    /// # Errors
    /// [`ConnectError::File`] and [`ConnectError::Token`].
    pub(crate) async fn authorize<T>(&self, message: T) -> Result<Request<T>, ConnectError> {
        let token = read("token file", &self.token_file).await?;
        let malformed = || ConnectError::Token { path: self.token_file.to_path_buf() };
        let token = std::str::from_utf8(&token).ok().map(str::trim).filter(|token| !token.is_empty()).ok_or_else(malformed)?;
        let bearer: MetadataValue<Ascii> = format!("Bearer {token}").parse().ok().ok_or_else(malformed)?;
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", bearer);
        Ok(request)
    }

    fn settings(&self) -> Endpoint {
        Endpoint::from(self.uri.clone())
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .tcp_nodelay(true)
    }

    async fn dial(self) -> Result<TlsStream<TcpStream>, ConnectError> {
        let config = self.tls_config().await?;
        let (host, port) = (Arc::clone(&self.host), self.port);
        match tokio::time::timeout(CONNECT_TIMEOUT, self.handshake(config)).await {
            Ok(result) => result,
            Err(_elapsed) => Err(ConnectError::Timeout { host, port }),
        }
    }

    async fn handshake(self, config: Arc<ClientConfig>) -> Result<TlsStream<TcpStream>, ConnectError> {
        let (host, port) = (self.host, self.port);
        let found = tokio::net::lookup_host((&*host, port)).await.map(Iterator::collect::<Vec<_>>);
        let addresses = match found {
            Ok(addresses) => addresses,
            Err(source) => return Err(ConnectError::Name { host, source }),
        };
        let tcp = match TcpStream::connect(&*addresses).await {
            Ok(tcp) => tcp,
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => return Err(ConnectError::Refused { host, port }),
            Err(source) => return Err(ConnectError::Tcp { host, port, source }),
        };
        if let Err(source) = tcp.set_nodelay(true) {
            return Err(ConnectError::Tcp { host, port, source });
        }
        TlsConnector::from(config).connect(self.name, tcp).await.map_err(|source| match certificate_error(&source) {
            Some(fault) => ConnectError::Certificate { host, port, root: self.root_cert.to_path_buf(), fault },
            None => ConnectError::Tls { host, port, source },
        })
    }

    async fn tls_config(&self) -> Result<Arc<ClientConfig>, ConnectError> {
        let path = || self.root_cert.to_path_buf();
        let pem = read("root certificate file", &self.root_cert).await?;
        let refused = |reason: String| ConnectError::RootRefused { path: path(), reason };
        let mut roots = RootCertStore::empty();
        for root in certificates_in(&pem).map_err(|source| ConnectError::Root { path: path(), source })? {
            roots.add(root).map_err(|error| refused(error.to_string()))?;
        }
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
            .build()
            .map_err(|error| refused(error.to_string()))?;
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| refused(error.to_string()))?
            .with_webpki_verifier(verifier)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }
}

impl tower_service::Service<Uri> for ControllerEndpoint {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = ConnectError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _uri: Uri) -> Self::Future {
        let endpoint = self.clone();
        Box::pin(async move { endpoint.dial().await.map(TokioIo::new) })
    }
}

/// The cause of a failed connect or call, as an operator reads it: this module's own error where one is at the root of it.
pub(crate) fn in_words(error: &(dyn Error + 'static)) -> String {
    if let Some(cause) = causes(error).find_map(|error| error.downcast_ref::<ConnectError>()) {
        return cause.to_string();
    }
    let root = causes(error).last().unwrap_or(error);
    match root.downcast_ref::<Status>() {
        Some(status) if status.code() == Code::Unauthenticated => {
            format!("the controller refused the token: {}", status.message())
        }
        Some(status) => format!("the controller answered {:?}: {}", status.code(), status.message()),
        None => root.to_string(),
    }
}

/// Whether the cause stays until a person mends it: a wrong or missing file, a root that does not fit, a token refused.
pub(crate) fn needs_operator(error: &(dyn Error + 'static)) -> bool {
    causes(error).any(|error| {
        let own = error.downcast_ref::<ConnectError>().is_some_and(|error| match error {
            ConnectError::File { .. }
            | ConnectError::Root { .. }
            | ConnectError::RootRefused { .. }
            | ConnectError::Token { .. }
            | ConnectError::Name { .. }
            | ConnectError::Certificate { .. } => true,
            ConnectError::Refused { .. } | ConnectError::Tcp { .. } | ConnectError::Timeout { .. } | ConnectError::Tls { .. } => {
                false
            }
        });
        let refused = |status: &Status| matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied);
        own || error.downcast_ref::<Status>().is_some_and(refused)
    })
}

fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error| {
        let error: &'a (dyn Error + 'static) = *error;
        error.source()
    })
}

async fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, ConnectError> {
    let fail = |source| ConnectError::File { what, path: path.to_path_buf(), source };
    let file = tokio::fs::File::open(path).await.map_err(fail)?;
    let mut content = Vec::new();
    file.take(FILE_LIMIT + 1).read_to_end(&mut content).await.map_err(fail)?;
    if content.len() as u64 > FILE_LIMIT {
        return Err(fail(io::Error::new(io::ErrorKind::FileTooLarge, format!("it is longer than {FILE_LIMIT} bytes"))));
    }
    Ok(content)
}

#[expect(clippy::wildcard_enum_match_arm, reason = "the library's enum grows; only one case is about the certificate")]
fn certificate_error(error: &io::Error) -> Option<CertificateError> {
    match error.get_ref()?.downcast_ref::<rustls::Error>()? {
        rustls::Error::InvalidCertificate(cause) => Some(cause.clone()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(url: &str) -> Result<ControllerEndpoint, EndpointError> {
        ControllerEndpoint::new(url, Path::new("/root.pem"), Path::new("/token"))
    }

    #[test]
    fn a_controller_is_named_by_address_or_by_name() {
        for (url, host) in [
            ("https://10.0.0.1:15012", "10.0.0.1"),
            ("https://[fd00::1]:15012", "fd00::1"),
            ("https://culvert.culvert-system.svc:15012/", "culvert.culvert-system.svc"),
        ] {
            assert_eq!(&*endpoint(url).expect("a legal address").host, host);
        }
    }

    #[test]
    fn other_addresses_are_refused_with_the_right_form() {
        for url in ["", "http://a:1", "https://a", "https://a:1/x", "https://u@a:1", "a:1", "https://a b:1", "https://:1"] {
            let error = endpoint(url).expect_err(url);
            assert!(error.to_string().contains("https://HOST:PORT"), "{error}");
        }
    }
}
