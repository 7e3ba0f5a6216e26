//! Controllers side by side on a state in the API that another version has left: an older one, which wrote less, or a newer one, which wrote
//! more. The state is the Secret of the root, the published root, and what operators wrote.

use std::time::{Duration, SystemTime};

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use rustls::pki_types::{CertificateDer, pem::PemObject};
use serde_json::{Value, json};

use super::on_kubernetes::{WEB, certificate, cluster, replica, root, token};
use crate::controller::authority::fingerprint;
use crate::controller::kubernetes::roots::{CONFIG_MAP, KEY};
use crate::controller::kubernetes::rotate::{RotationStep, take};
use crate::controller::kubernetes::rotation::{self, CERTIFICATE, SECRET};
use crate::controller::kubernetes::test_server::ApiServer;

const NAMESPACE: &str = "culvert-system";

fn secret() -> Secret {
    rotation::new_secret(NAMESPACE, "cluster.local", SystemTime::now()).unwrap()
}

/// The fingerprint of the root that a Secret holds.
fn of_secret(secret: &Secret) -> String {
    let text = &secret.data.as_ref().unwrap()[CERTIFICATE].0;
    fingerprint(&CertificateDer::from_pem_slice(text).unwrap())
}

fn stored(server: &ApiServer) -> Value {
    server.object("", "secrets", NAMESPACE, SECRET).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn controllers_share_the_root_that_an_older_one_has_left_and_leave_it_as_it_is() {
    let server = cluster();
    // What every version has written: the pair, and nothing that says whose or of which type it is.
    let mut old = secret();
    (old.type_, old.metadata.labels, old.metadata.annotations) = (None, None, None);
    server.put(&json!(old).to_string());
    // A root that is published no more, as an older version had it: without labels.
    let stale = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": CONFIG_MAP, "namespace": "shop"},
                       "data": {KEY: "an earlier root"}});
    server.put(&stale.to_string());
    let before = stored(&server);
    let replicas = [replica(&server).await, replica(&server).await];
    let agent = token(&server, "node-a");
    for replica in &replicas {
        let chain = certificate(&server, replica, &agent, WEB).await.unwrap();
        let last = CertificateDer::from_pem_slice(chain.last().unwrap().as_bytes()).unwrap();
        assert_eq!(fingerprint(&last), of_secret(&old));
    }
    assert_eq!(fingerprint(&root(&server).await), of_secret(&old));
    let published = |server: &ApiServer| server.object("", "configmaps", "shop", CONFIG_MAP).unwrap()["data"][KEY].clone();
    server.until("the published root is the one in force", |server| published(server) != json!("an earlier root")).await;
    assert_eq!(stored(&server), before, "the Secret was written anew");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_newer_version_has_put_beside_the_root_is_passed_over_and_survives_a_rotation() {
    const ADDED: &str = "culvert.dev/of-a-newer-version";
    let server = cluster();
    let mut new = secret();
    new.data.as_mut().unwrap().insert("newer.pem".to_owned(), ByteString(b"newer".to_vec()));
    new.metadata.annotations.get_or_insert_default().insert(ADDED.to_owned(), "annotation".to_owned());
    new.metadata.labels.get_or_insert_default().insert(ADDED.to_owned(), "label".to_owned());
    server.put(&json!(new).to_string());
    let replicas = [replica(&server).await, replica(&server).await];
    let agent = token(&server, "node-a");
    for replica in &replicas {
        let chain = certificate(&server, replica, &agent, WEB).await.unwrap();
        let last = CertificateDer::from_pem_slice(chain.last().unwrap().as_bytes()).unwrap();
        assert_eq!(fingerprint(&last), of_secret(&new));
    }
    let trust_domain = "cluster.local".parse().unwrap();
    let (overlap, longest) = (Duration::ZERO, Duration::from_secs(60));
    let steps = [RotationStep::Start { trust_domain, overlap, longest }, RotationStep::Finish { danger_now: true }];
    for step in steps {
        take(&server.client(), NAMESPACE, &step, SystemTime::now()).await.unwrap();
        let secret: Secret = serde_json::from_value(stored(&server)).unwrap();
        assert_eq!(secret.data.as_ref().unwrap()["newer.pem"].0, b"newer");
        assert_eq!(secret.metadata.annotations.as_ref().unwrap()[ADDED], "annotation");
        assert_eq!(secret.metadata.labels.as_ref().unwrap()[ADDED], "label");
        assert_ne!(of_secret(&secret), of_secret(&new), "nothing was rotated");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_with_fields_of_newer_releases_are_read_for_what_is_known_of_them() {
    let server = cluster();
    let more = "newerField: {a: [1, two, {three: 3}]}";
    server.put(&format!(
        "{{apiVersion: v1, kind: Pod, {more}, metadata: {{name: late, namespace: shop, uid: uid-late, labels: {{app: late}}, {more}}}, \
         spec: {{nodeName: node-a, serviceAccountName: late, containers: [], {more}}}, \
         status: {{podIP: 10.1.0.77, phase: Running, {more}}}}}"
    ));
    server.put(&format!(
        "{{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {{name: default, namespace: shop}}, \
         spec: {{mtls: {{mode: STRICT, {more}}}, {more}}}}}"
    ));
    let replica = replica(&server).await;
    let identity = "spiffe://cluster.local/ns/shop/sa/late";
    certificate(&server, &replica, &token(&server, "node-a"), identity).await.unwrap();
}
