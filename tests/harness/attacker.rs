//! A peer that keeps to no rule: TLS to anywhere with any certificate or none, and real certificates got with a node's token.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConnection, StreamOwned};

use crate::forge::Credentials;
use crate::http2;
use crate::mesh::{Mesh, NODES};
use crate::peer::{self, client_config};

/// A TLS connection of the attacker's.
pub type Tls = StreamOwned<ClientConnection, TcpStream>;

impl Mesh {
    /// The token of a node.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn token(&self, node: usize) -> String {
        let path = self.state_dir().join("tokens").join(NODES[node]);
        fs::read_to_string(path).expect("the controller has written it").trim().to_owned()
    }

    /// A real certificate for a workload on `node`, asked of the controller with that node's token.
    ///
    /// # Panics
    /// When the controller does not sign.
    #[must_use]
    pub fn credentials(&self, node: usize, identity: &str) -> Credentials {
        let (token, identity) = (self.token(node), identity.to_owned());
        self.node(node).run(move || ask(CONTROLLER, Some(&token), &identity, 0)).expect("a certificate")
    }
}

/// Asks a controller for a certificate for `identity` that lives so many seconds, or as long as the controller likes with 0, from the
/// caller's namespace.
///
/// # Errors
/// The status of the answer, as a number.
///
/// # Panics
/// When there is no answer.
pub fn ask(to: SocketAddr, token: Option<&str>, identity: &str, seconds: u8) -> Result<Credentials, String> {
    let key = rcgen::KeyPair::generate().expect("a key");
    let request = rcgen::CertificateParams::default().serialize_request(&key).expect("a request").pem().expect("PEM");
    let asked = certificate_request(&request, identity, seconds);
    let answer = peer::request(to, CREATE_CERTIFICATE, token, &asked).expect("an answer");
    if answer.status != "0" {
        return Err(answer.status);
    }
    // Of the answer nothing but the certificates matters, each of which is a text of its own.
    let answer = String::from_utf8_lossy(&answer.message);
    let texts = answer.split(BEGIN).skip(1).map(|text| format!("{BEGIN}{text}"));
    let chain = texts.map(|text| CertificateDer::from_pem_slice(text.as_bytes()).expect("PEM")).collect();
    Ok(Credentials { chain, key: PrivatePkcs8KeyDer::from(key.serialize_der()).into() })
}

const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
/// Where the controller of a [`Mesh`] listens.
pub const CONTROLLER: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 77, 0, 1)), 15012);
/// The path of the certificate service.
pub const CREATE_CERTIFICATE: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";
/// The path of the discovery service.
pub const DISCOVERY: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";

/// An `IstioCertificateRequest` for `identity`, and for a life of so many seconds unless that is 0.
///
/// # Panics
/// When the life is longer than a byte of protobuf can say.
#[must_use]
pub fn certificate_request(request: &str, identity: &str, seconds: u8) -> Vec<u8> {
    assert!(seconds < 128, "a life of {seconds} s");
    let value = http2::field(3, identity.as_bytes());
    let entry = [http2::field(1, b"ImpersonatedIdentity"), http2::field(2, &value)].concat();
    let metadata = http2::field(1, &entry);
    let life = if seconds == 0 { Vec::new() } else { vec![3 << 3, seconds] };
    [http2::field(1, request.as_bytes()), life, http2::field(4, &metadata)].concat()
}

/// Connects from the caller's namespace and shakes hands, whoever the server is. Both may take five seconds.
///
/// # Errors
/// The connection's, or the server's refusal.
pub fn connect(to: SocketAddr, credentials: Option<&Credentials>, alpn: &[&[u8]]) -> io::Result<Tls> {
    let mut socket = dial(to)?;
    let mut tls =
        ClientConnection::new(client_config(credentials.cloned(), alpn), ServerName::from(to.ip())).map_err(io::Error::other)?;
    while tls.is_handshaking() {
        tls.complete_io(&mut socket)?;
    }
    Ok(StreamOwned::new(tls, socket))
}

/// Connects from the caller's namespace. Nothing on the connection takes longer than five seconds.
///
/// # Errors
/// The connection's.
pub fn dial(to: SocketAddr) -> io::Result<TcpStream> {
    let patience = Duration::from_secs(5);
    let socket = TcpStream::connect_timeout(&to, patience)?;
    socket.set_read_timeout(Some(patience))?;
    socket.set_write_timeout(Some(patience))?;
    Ok(socket)
}

/// The first bytes of an honest client.
///
/// # Panics
/// Never.
#[must_use]
pub fn client_hello(alpn: &[&[u8]]) -> Vec<u8> {
    let name = ServerName::from(std::net::IpAddr::from([10, 77, 0, 1]));
    let mut tls = ClientConnection::new(client_config(None, alpn), name).expect("a configuration");
    let mut hello = Vec::new();
    while tls.wants_write() {
        tls.write_tls(&mut hello).expect("memory takes all");
    }
    hello
}
