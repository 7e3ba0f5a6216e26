use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use prost_types::{Struct, Value, value::Kind};
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::{CertificateDer, UnixTime, pem::PemObject};
use tonic::{Code, Request, Status};
use webpki::{EndEntityCert, KeyUsage};

use super::{Mesh, pod};
use crate::proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use crate::proto::ca::{IstioCertificateRequest, IstioCertificateResponse};

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

async fn mesh() -> Mesh {
    Mesh::start(&[("web.yaml", pod("web", "node-a", "10.1.0.2")), ("db.yaml", pod("db", "node-b", "10.2.0.2"))]).await
}

pub(super) fn request(identity: &str) -> IstioCertificateRequest {
    let key = KeyPair::generate().unwrap();
    let csr = CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
    let identity = Value { kind: Some(Kind::StringValue(identity.to_owned())) };
    let fields = BTreeMap::from([("ImpersonatedIdentity".to_owned(), identity)]);
    IstioCertificateRequest { csr, validity_duration: 600, metadata: Some(Struct { fields }) }
}

async fn send(mesh: &Mesh, request: Request<IstioCertificateRequest>) -> Result<IstioCertificateResponse, Status> {
    let mut client = IstioCertificateServiceClient::new(mesh.channel().await);
    client.create_certificate(request).await.map(tonic::Response::into_inner)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_of_the_asking_node_gets_a_chain_that_verifies() {
    let mesh = mesh().await;
    let response = send(&mesh, mesh.authorized("node-a", request(WEB))).await.unwrap();
    let chain: Vec<_> = response.cert_chain.iter().map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()).collect();
    assert_eq!(chain.last(), Some(&mesh.root()));
    let root = mesh.root();
    let anchors = [webpki::anchor_from_trusted_cert(&root).unwrap()];
    let leaf = EndEntityCert::try_from(&chain[0]).unwrap();
    for usage in [KeyUsage::server_auth(), KeyUsage::client_auth()] {
        let now = UnixTime::now();
        leaf.verify_for_usage(webpki::ALL_VERIFICATION_ALGS, &anchors, &[], now, usage, None, None).unwrap();
    }
    assert_eq!(leaf.valid_uri_names().collect::<Vec<_>>(), [WEB]);
    let (_, parsed) = x509_parser::parse_x509_certificate(&chain[0]).unwrap();
    let ends = Duration::from_secs(parsed.validity().not_after.timestamp().try_into().unwrap());
    let left = (SystemTime::UNIX_EPOCH + ends).duration_since(SystemTime::now()).unwrap();
    assert!(left > Duration::from_secs(590) && left <= Duration::from_secs(601), "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_of_another_node_is_refused_by_name() {
    let mesh = mesh().await;
    let refused = send(&mesh, mesh.authorized("node-b", request(WEB))).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains(WEB) && refused.message().contains("node-b"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn identities_of_nobody_are_refused() {
    let mesh = mesh().await;
    for identity in ["spiffe://cluster.local/ns/shop/sa/nobody", "spiffe://other.domain/ns/shop/sa/web"] {
        let refused = send(&mesh, mesh.authorized("node-a", request(identity))).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{identity}");
    }
    for identity in ["", "web", "spiffe://cluster.local/ns/shop"] {
        let refused = send(&mesh, mesh.authorized("node-a", request(identity))).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{identity}");
    }
    let mut without = request(WEB);
    without.metadata = None;
    let refused = send(&mesh, mesh.authorized("node-a", without)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_outside_the_mesh_is_refused_until_it_joins() {
    let mesh = mesh().await;
    let outside = pod("out", "node-a", "10.1.0.9").replace("{app: out}", "{culvert.dev/mesh: disabled}");
    let identity = "spiffe://cluster.local/ns/shop/sa/out";
    mesh.write("out.yaml", &outside);
    let refused = send(&mesh, mesh.authorized("node-a", request(identity))).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    mesh.write("out.yaml", &outside.replace("disabled", "enabled"));
    send(&mesh, mesh.authorized("node-a", request(identity))).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_without_a_known_token_is_refused() {
    let mesh = mesh().await;
    let refused = send(&mesh, Request::new(request(WEB))).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    let mut token = mesh.token("node-a");
    token.replace_range(0..1, if token.starts_with('A') { "B" } else { "A" });
    let node_b = mesh.token("node-b");
    for value in [format!("Bearer {token}"), mesh.token("node-a"), format!("Basic {node_b}"), "Bearer ".to_owned()] {
        let mut with = Request::new(request(WEB));
        with.metadata_mut().insert("authorization", value.parse().unwrap());
        assert_eq!(send(&mesh, with).await.unwrap_err().code(), Code::Unauthenticated, "{value}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_request_is_refused() {
    let mesh = mesh().await;
    let mut tampered = request(WEB);
    let at = tampered.csr.find("MI").unwrap() + 120;
    let other = if tampered.csr.as_bytes()[at] == b'A' { "B" } else { "A" };
    tampered.csr.replace_range(at..=at, other);
    let mut long = request(WEB);
    long.csr = "x".repeat(20_000);
    let mut none = request(WEB);
    none.csr.clear();
    for bad in [tampered, long, none] {
        let refused = send(&mesh, mesh.authorized("node-a", bad)).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    }
}
