//! Handshakes in memory: the one that passes, and each that must not, on both sides.

use rcgen::ExtendedKeyUsagePurpose;
use rustls::crypto::CryptoProvider;
use rustls::server::ServerConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;
use crate::identity::test_authority::{Issued, TestAuthority, now, seconds};
use crate::tunnel::verify::{Peer, PeerFault, peer_identity};

const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/cart";
const SERVER: &str = "spiffe://cluster.local/ns/shop/sa/stock";
const ALPN: &[&[u8]] = &[b"h2"];

#[tokio::test]
async fn two_workloads_of_one_mesh_agree_on_tls_1_3_and_know_each_other() {
    let mesh = Mesh::new();
    let (client, server) = mesh.handshake(&mesh.client(), &mesh.server()).await;
    let (client, server) = (client.expect("the client passes"), server.expect("the server passes"));
    assert_eq!(client.peer.expect("named"), SERVER.parse().expect("legal"));
    assert_eq!(server.peer.expect("named"), CLIENT.parse().expect("legal"));
    assert_eq!(client.group, Some(rustls::NamedGroup::X25519MLKEM768));
    assert_eq!(server.server_name, None);
    assert_eq!(client.alpn.as_deref(), Some(&b"h2"[..]));
}

#[tokio::test]
async fn a_peer_without_the_hybrid_group_is_served_with_a_classical_one() {
    let mesh = Mesh::new();
    let classical = CryptoProvider {
        kx_groups: vec![rustls::crypto::aws_lc_rs::kx_group::SECP256R1],
        ..rustls::crypto::aws_lc_rs::default_provider()
    };
    let verifier = ServerVerifier { bundle: mesh.bundle(), expected: vec![SERVER.parse().expect("legal")], provider: provider() };
    let config = ClientConfig::builder_with_provider(Arc::new(classical))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(Presented(Some(mesh.client().svid(CLIENT).certified_key))));
    let (client, server) = connect(Arc::new(config), mesh.server_config(&mesh.server())).await;
    assert_eq!(client.expect("passes").group, Some(rustls::NamedGroup::secp256r1));
    assert!(server.is_ok());
}

#[tokio::test]
async fn a_peer_of_another_trust_domain_is_refused_by_both_sides() {
    let mesh = Mesh::new();
    let stranger = mesh.authority.leaf("spiffe://elsewhere/ns/shop/sa/cart").issue();
    mesh.server_refuses(&stranger, &["wrong trust domain `elsewhere`", "spiffe://elsewhere/ns/shop/sa/cart", "cluster.local"])
        .await;
    let stranger = mesh.authority.leaf("spiffe://elsewhere/ns/shop/sa/stock").issue();
    mesh.client_refuses(&stranger, &["spiffe://elsewhere/ns/shop/sa/stock", SERVER]).await;
}

#[tokio::test]
async fn an_expired_certificate_is_refused_by_both_sides() {
    let mesh = Mesh::new();
    let expired = |id| mesh.authority.leaf(id).valid(now() - seconds(100), now() - seconds(5)).issue();
    mesh.server_refuses(&expired(CLIENT), &["expired since 2", CLIENT, "cluster.local"]).await;
    mesh.client_refuses(&expired(SERVER), &["expired since 2", SERVER]).await;
}

#[tokio::test]
async fn a_certificate_that_is_not_valid_yet_is_refused_by_both_sides() {
    let mesh = Mesh::new();
    let early = |id| mesh.authority.leaf(id).valid(now() + seconds(100), now() + seconds(500)).issue();
    mesh.server_refuses(&early(CLIENT), &["not valid before 2", CLIENT]).await;
    mesh.client_refuses(&early(SERVER), &["not valid before 2", SERVER]).await;
}

#[tokio::test]
async fn a_self_signed_certificate_is_refused_by_both_sides() {
    let mesh = Mesh::new();
    mesh.server_refuses(&mesh.authority.leaf(CLIENT).self_signed(), &["unknown issuer", CLIENT]).await;
    mesh.client_refuses(&mesh.authority.leaf(SERVER).self_signed(), &["unknown issuer", SERVER]).await;
}

#[tokio::test]
async fn a_certificate_from_another_authority_of_the_same_name_is_refused_by_both_sides() {
    let (mesh, other) = (Mesh::new(), TestAuthority::new("mesh"));
    let words: &[&str] = &["its chain"];
    mesh.server_refuses(&other.leaf(CLIENT).issue(), words).await;
    mesh.client_refuses(&other.leaf(SERVER).issue(), words).await;
}

#[tokio::test]
async fn a_server_that_is_another_workload_is_refused_by_the_client() {
    let mesh = Mesh::new();
    let other = "spiffe://cluster.local/ns/shop/sa/other";
    mesh.client_refuses(&mesh.authority.leaf(other).issue(), &["another workload", other, SERVER]).await;
}

#[tokio::test]
async fn any_of_several_expected_servers_passes() {
    let mesh = Mesh::new();
    let expected = ["spiffe://cluster.local/ns/shop/sa/other", SERVER].map(|id| id.parse().expect("legal")).to_vec();
    let config = client_config(&mesh.client().svid(CLIENT), &mesh.bundle(), expected, ALPN).expect("a configuration");
    let (client, _server) = connect(config, mesh.server_config(&mesh.server())).await;
    assert!(client.is_ok());
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let mesh = Mesh::new();
    let mut config = (*mesh.client_config(&mesh.client())).clone();
    config.client_auth_cert_resolver = Arc::new(Presented(None));
    let (client, server) = connect(Arc::new(config), mesh.server_config(&mesh.server())).await;
    assert!(matches!(handshake_fault(&server.expect_err("refused")), HandshakeFault::NoCertificate));
    let error = client.expect_err("told so");
    assert!(matches!(handshake_fault(&error), HandshakeFault::RefusedByPeer(AlertDescription::CertificateRequired)), "{error}");
}

#[tokio::test]
async fn an_authority_presented_as_a_workload_is_refused_by_both_sides() {
    let mesh = Mesh::new();
    mesh.server_refuses(&mesh.authority.leaf(CLIENT).authority_itself().issue(), &["authority", CLIENT]).await;
    mesh.client_refuses(&mesh.authority.leaf(SERVER).authority_itself().issue(), &["authority", SERVER]).await;
}

#[tokio::test]
async fn a_certificate_with_two_names_or_none_is_refused_by_both_sides() {
    let mesh = Mesh::new();
    let both = format!("{CLIENT} {SERVER}");
    mesh.server_refuses(&mesh.authority.leaf(&both).issue(), &["2 URI names"]).await;
    mesh.client_refuses(&mesh.authority.leaf(&both).issue(), &["2 URI names", SERVER]).await;
    mesh.server_refuses(&mesh.authority.leaf("").issue(), &["0 URI names"]).await;
    mesh.client_refuses(&mesh.authority.leaf("https://cluster.local/").issue(), &["names no workload"]).await;
}

#[tokio::test]
async fn a_certificate_for_the_other_side_only_is_refused_by_both_sides() {
    let mesh = Mesh::new();
    let client = mesh.authority.leaf(CLIENT).purpose(&[ExtendedKeyUsagePurpose::ServerAuth]).issue();
    mesh.server_refuses(&client, &["not issued for use by a client", CLIENT]).await;
    let server = mesh.authority.leaf(SERVER).purpose(&[ExtendedKeyUsagePurpose::ClientAuth]).issue();
    mesh.client_refuses(&server, &["not issued for use by a server", SERVER]).await;
    mesh.server_refuses(&mesh.authority.leaf(CLIENT).purpose(&[]).issue(), &["not issued for use by a client"]).await;
}

#[tokio::test]
async fn certificates_of_either_root_pass_while_two_are_trusted() {
    let (mesh, next) = (Mesh::new(), TestAuthority::new("next"));
    let bundle = TrustBundle::new([mesh.authority.root(), next.root()]).expect("legal roots");
    let expected = vec![SERVER.parse().expect("legal")];
    let client = client_config(&mesh.client().svid(CLIENT), &bundle, expected, ALPN).expect("a configuration");
    let server = next.leaf(SERVER).issue().svid(SERVER);
    let server = server_config(&server, &bundle, &domain(), ALPN).expect("a configuration");
    let (client, server) = connect(client, server).await;
    assert!(client.is_ok() && server.is_ok());
}

#[tokio::test]
async fn a_tls_1_2_peer_is_refused() {
    let mesh = Mesh::new();
    let old = rustls::crypto::aws_lc_rs::default_provider();
    let config = ClientConfig::builder_with_provider(Arc::new(old))
        .with_protocol_versions(&[&rustls::version::TLS12])
        .expect("versions")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ServerVerifier {
            bundle: mesh.bundle(),
            expected: vec![SERVER.parse().expect("legal")],
            provider: provider(),
        }))
        .with_client_cert_resolver(Arc::new(Presented(Some(mesh.client().svid(CLIENT).certified_key))));
    let (client, server) = connect(Arc::new(config), mesh.server_config(&mesh.server())).await;
    assert!(client.is_err() && server.is_err());
}

#[test]
fn without_a_root_or_an_expected_server_there_is_no_configuration() {
    let mesh = Mesh::new();
    let svid = mesh.client().svid(CLIENT);
    let expected = || vec![SERVER.parse().expect("legal")];
    let error = client_config(&svid, &mesh.bundle(), Vec::new(), ALPN).expect_err("nobody expected");
    assert_eq!(error, TlsError::NobodyExpected);
    let none = TrustBundle::empty();
    assert_eq!(client_config(&svid, &none, expected(), ALPN).expect_err("no roots"), TlsError::NoRoots);
    assert_eq!(server_config(&svid, &none, &domain(), ALPN).expect_err("no roots"), TlsError::NoRoots);
}

#[test]
fn an_empty_chain_names_nobody() {
    assert!(matches!(peer_identity(&[]), Err(PeerFault::Malformed(_))));
}

struct Mesh {
    authority: TestAuthority,
}

/// What one side knows after a handshake.
#[derive(Debug)]
struct Met {
    peer: Result<SpiffeId, PeerFault>,
    group: Option<rustls::NamedGroup>,
    alpn: Option<Vec<u8>>,
    server_name: Option<String>,
}

impl Mesh {
    fn new() -> Self {
        Self { authority: TestAuthority::new("mesh") }
    }

    fn client(&self) -> Issued {
        self.authority.leaf(CLIENT).issue()
    }

    fn server(&self) -> Issued {
        self.authority.leaf(SERVER).issue()
    }

    fn bundle(&self) -> TrustBundle {
        TrustBundle::new([self.authority.root()]).expect("a legal root")
    }

    fn client_config(&self, client: &Issued) -> Arc<ClientConfig> {
        let expected = vec![SERVER.parse().expect("legal")];
        client_config(&client.svid(CLIENT), &self.bundle(), expected, ALPN).expect("a configuration")
    }

    fn server_config(&self, server: &Issued) -> Arc<ServerConfig> {
        server_config(&server.svid(SERVER), &self.bundle(), &domain(), ALPN).expect("a configuration")
    }

    async fn handshake(&self, client: &Issued, server: &Issued) -> (io::Result<Met>, io::Result<Met>) {
        connect(self.client_config(client), self.server_config(server)).await
    }

    /// The server refuses this client, in these words, and the client hears of it.
    async fn server_refuses(&self, client: &Issued, words: &[&str]) {
        let (client, server) = self.handshake(client, &self.server()).await;
        check(&server.expect_err("the server refuses"), Peer::Client, words);
        let error = client.expect_err("the client is told");
        assert!(matches!(handshake_fault(&error), HandshakeFault::RefusedByPeer(_)), "{error}");
    }

    /// The client refuses this server, in these words, and the server hears of it.
    async fn client_refuses(&self, server: &Issued, words: &[&str]) {
        let (client, server) = self.handshake(&self.client(), server).await;
        check(&client.expect_err("the client refuses"), Peer::Server, words);
        let error = server.expect_err("the server is told");
        assert!(matches!(handshake_fault(&error), HandshakeFault::RefusedByPeer(_)), "{error}");
    }
}

fn check(error: &io::Error, peer: Peer, words: &[&str]) {
    let HandshakeFault::Refused(error) = handshake_fault(error) else { panic!("{error} is no refusal") };
    assert_eq!(error.peer, peer);
    let text = error.to_string();
    for word in words {
        assert!(text.contains(word), "`{word}` is not in: {text}");
    }
}

fn domain() -> TrustDomain {
    "cluster.local".parse().expect("legal")
}

/// Shakes hands and moves one byte each way, so that a refusal after the client's own handshake is seen as well.
async fn connect(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> (io::Result<Met>, io::Result<Met>) {
    let (near, far) = tokio::io::duplex(1 << 16);
    let client = async move {
        let mut stream = TlsConnector::from(client).connect(server_name(), near).await?;
        stream.write_all(b"c").await?;
        stream.flush().await?;
        stream.read_u8().await?;
        let (_, connection) = stream.get_ref();
        Ok(Met {
            peer: peer_identity(connection.peer_certificates().unwrap_or_default()),
            group: connection.negotiated_key_exchange_group().map(|group| group.name()),
            alpn: connection.alpn_protocol().map(<[u8]>::to_vec),
            server_name: None,
        })
    };
    let server = async move {
        let mut stream = TlsAcceptor::from(server).accept(far).await?;
        stream.read_u8().await?;
        stream.write_all(b"s").await?;
        stream.flush().await?;
        let (_, connection) = stream.get_ref();
        Ok(Met {
            peer: peer_identity(connection.peer_certificates().unwrap_or_default()),
            group: connection.negotiated_key_exchange_group().map(|group| group.name()),
            alpn: connection.alpn_protocol().map(<[u8]>::to_vec),
            server_name: connection.server_name().map(str::to_owned),
        })
    };
    tokio::join!(client, server)
}
