//! A whole controller on a scripted API server, spoken to as agents do.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rustls::pki_types::{CertificateDer, pem::PemObject};
use serde_json::json;
use tempfile::TempDir;
use tonic::{Code, Request, Status};

use super::certificates::request;
use super::{Discovery, channel, config, names, pod};
use crate::controller::authority::fingerprint;
use crate::controller::kubernetes::roots::{CONFIG_MAP, KEY};
use crate::controller::kubernetes::test_server::ApiServer;
use crate::controller::on_kubernetes::{KubernetesConfig, start};
use crate::controller::{ControllerConfig, RunningController, SourceConfig};
use crate::proto::ADDRESS_TYPE;
use crate::proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;

const AGENT: &str = "system:serviceaccount:culvert-system:culvert-agent";
pub(super) const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

/// A cluster with an agent on each of two nodes.
pub(super) fn cluster() -> ApiServer {
    let server = ApiServer::with(super::NODES);
    for node in ["node-a", "node-b"] {
        server.put(&format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: agent-{node}, namespace: culvert-system, uid: uid-{node}}}, \
             spec: {{nodeName: {node}, containers: [], hostNetwork: true}}}}"
        ));
    }
    server.put(&pod("web", "node-a", "10.1.0.2"));
    server.put(&pod("db", "node-b", "10.2.0.2"));
    server
}

pub(super) async fn replica(server: &ApiServer) -> RunningController {
    let kubernetes = KubernetesConfig {
        kubeconfig: None,
        namespace: "culvert-system".to_owned(),
        service: "culvert-controller".to_owned(),
        excluded_namespaces: vec!["kube-system".to_owned()],
        metrics_listen: "127.0.0.1:0".parse().unwrap(),
        ready_listen: "127.0.0.1:0".parse().unwrap(),
    };
    let nowhere = TempDir::new().unwrap();
    let config =
        ControllerConfig { source: SourceConfig::Kubernetes(kubernetes.clone()), ..config(nowhere.path(), nowhere.path()) };
    start(config, kubernetes, server.client(), Arc::new(SystemTime::now)).await.unwrap()
}

/// The token of the agent on a node, as the API server knows it.
pub(super) fn token(server: &ApiServer, node: &str) -> String {
    let exp = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() + 3600;
    let claims = json!({ "aud": ["culvert-controller"], "sub": AGENT, "exp": exp });
    let text = format!("e30.{}.{}", URL_SAFE_NO_PAD.encode(claims.to_string()), URL_SAFE_NO_PAD.encode(node));
    let extra = json!({
        "authentication.kubernetes.io/pod-name": [format!("agent-{node}")],
        "authentication.kubernetes.io/pod-uid": [format!("uid-{node}")],
    });
    let user = json!({ "username": AGENT, "extra": extra });
    server.answer_review(&text, json!({ "authenticated": true, "audiences": ["culvert-controller"], "user": user }));
    text
}

fn authorized<T>(token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

/// The root as it is published.
pub(super) async fn root(server: &ApiServer) -> CertificateDer<'static> {
    let published = |server: &ApiServer| server.object("", "configmaps", "culvert-system", CONFIG_MAP);
    server.until("the root is published", |server| published(server).is_some()).await;
    let text = published(server).unwrap()["data"][KEY].as_str().unwrap().to_owned();
    CertificateDer::from_pem_slice(text.as_bytes()).unwrap()
}

pub(super) async fn certificate(
    server: &ApiServer,
    replica: &RunningController,
    token: &str,
    identity: &str,
) -> Result<Vec<String>, Status> {
    let channel = channel(replica.address(), root(server).await).await;
    let mut client = IstioCertificateServiceClient::new(channel);
    let response = client.create_certificate(authorized(token, request(identity))).await?;
    Ok(response.into_inner().cert_chain)
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_get_certificates_for_pods_of_their_node_from_any_replica_and_for_no_others() {
    let server = cluster();
    let replicas = [replica(&server).await, replica(&server).await];
    let (agent_a, agent_b) = (token(&server, "node-a"), token(&server, "node-b"));
    let root = root(&server).await;
    for replica in &replicas {
        let chain = certificate(&server, replica, &agent_a, WEB).await.unwrap();
        let last = CertificateDer::from_pem_slice(chain.last().unwrap().as_bytes()).unwrap();
        assert_eq!(fingerprint(&last), fingerprint(&root));
        let refused = certificate(&server, replica, &agent_b, WEB).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
        let refused = certificate(&server, replica, "not.a.token", WEB).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated, "{refused}");
    }
    assert!(server.object("", "configmaps", "shop", CONFIG_MAP).is_some(), "the namespace has enrolled pods");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_was_made_a_moment_ago_gets_its_certificate_even_when_the_watch_is_behind() {
    let server = cluster();
    let replica = replica(&server).await;
    let agent = token(&server, "node-a");
    server.hold_watches(true);
    server.put(&pod("new", "node-a", "10.1.0.7"));
    let identity = "spiffe://cluster.local/ns/shop/sa/new";
    certificate(&server, &replica, &agent, identity).await.unwrap();
    let refused = certificate(&server, &replica, &token(&server, "node-b"), identity).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_hear_of_the_cluster_as_of_manifests_and_of_what_changes() {
    let server = cluster();
    let replica = replica(&server).await;
    let channel = channel(replica.address(), root(&server).await).await;
    let token = token(&server, "node-a");
    let mut stream = Discovery::open(channel, |request| authorized(&token, request)).await;
    let (resources, _) = stream.all(ADDRESS_TYPE, &[]).await;
    let mut found = names(&resources);
    found.sort_unstable();
    let agents = ["Kubernetes//Pod/shop/db", "Kubernetes//Pod/shop/web"];
    assert_eq!(found, agents);
    server.put(&pod("web", "node-a", "10.1.0.3"));
    assert_eq!(names(&stream.next().await.unwrap().resources), ["Kubernetes//Pod/shop/web"]);
    server.set_down(true);
    let silence = tokio::time::timeout(Duration::from_millis(500), stream.next()).await;
    assert!(silence.is_err(), "an API server that is down changes nothing");
    server.delete("", "pods", "shop", "db");
    server.set_down(false);
    assert_eq!(stream.next().await.unwrap().removed_resources, ["Kubernetes//Pod/shop/db"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn namespaces_that_are_excluded_are_not_in_the_mesh_whatever_their_labels_say() {
    let server = cluster();
    server.put("{apiVersion: v1, kind: Namespace, metadata: {name: kube-system, labels: {culvert.dev/mesh: enabled}}}");
    server.put(&pod("dns", "node-a", "10.1.0.8").replace("namespace: shop", "namespace: kube-system"));
    let replica = replica(&server).await;
    let identity = "spiffe://cluster.local/ns/kube-system/sa/dns";
    let refused = certificate(&server, &replica, &token(&server, "node-a"), identity).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    assert!(server.object("", "configmaps", "kube-system", CONFIG_MAP).is_none());
}
