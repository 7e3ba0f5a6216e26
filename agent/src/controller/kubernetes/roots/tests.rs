use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls_pki_types::CertificateDer;
use serde_json::Value;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{CONFIG_MAP, KEY, SIGNER, TRUST_BUNDLE, start};
use crate::controller::authority::{Material, pem_of};
use crate::controller::kubernetes::test_server::ApiServer;

/// What a publisher follows.
struct Published {
    roots: watch::Sender<Arc<[CertificateDer<'static>]>>,
    namespaces: watch::Sender<BTreeSet<Arc<str>>>,
    _stop: DropGuard,
}

fn root() -> CertificateDer<'static> {
    Material::new_root("cluster.local", SystemTime::now().into()).unwrap().material.anchor().clone()
}

fn publish(server: &ApiServer, roots: &[CertificateDer<'static>], namespaces: &[&str]) -> Published {
    let roots = watch::Sender::new(Arc::from(roots.to_vec()));
    let namespaces = watch::Sender::new(namespaces.iter().map(|name| Arc::from(*name)).collect());
    let stop = CancellationToken::new();
    start(server.client(), "culvert-system".to_owned(), roots.subscribe(), namespaces.subscribe(), stop.clone());
    Published { roots, namespaces, _stop: stop.drop_guard() }
}

/// What is published in a namespace.
fn text(server: &ApiServer, namespace: &str) -> Option<String> {
    let map = server.object("", "configmaps", namespace, CONFIG_MAP)?;
    map["data"][KEY].as_str().map(str::to_owned)
}

#[tokio::test(start_paused = true)]
async fn the_roots_are_in_the_system_namespace_and_in_each_that_has_enrolled_pods_and_in_no_other() {
    let (server, root) = (ApiServer::new(), root());
    let published = publish(&server, std::slice::from_ref(&root), &["shop"]);
    server.until("published", |server| server.all("configmaps").len() == 2).await;
    let wanted = Some(pem_of(&root));
    assert_eq!([text(&server, "culvert-system"), text(&server, "shop")], [wanted.clone(), wanted.clone()]);
    published.namespaces.send_replace([Arc::from("shop"), Arc::from("bank")].into());
    server.until("published in bank", |server| text(server, "bank") == wanted).await;
    assert!(text(&server, "default").is_none());
    assert_eq!(server.all("clustertrustbundles").len(), 0, "the API has none");
}

#[tokio::test(start_paused = true)]
async fn while_a_root_is_exchanged_both_are_published() {
    let (server, old, new) = (ApiServer::new(), root(), root());
    let published = publish(&server, std::slice::from_ref(&old), &[]);
    published.roots.send_replace([new.clone(), old.clone()].into());
    let both = pem_of(&new) + &pem_of(&old);
    server.until("both", |server| text(server, "culvert-system").as_ref() == Some(&both)).await;
    published.roots.send_replace([new.clone()].into());
    server.until("the new one", |server| text(server, "culvert-system") == Some(pem_of(&new))).await;
}

#[tokio::test(start_paused = true)]
async fn what_somebody_changes_or_removes_is_put_right() {
    let (server, root) = (ApiServer::new(), root());
    let _published = publish(&server, std::slice::from_ref(&root), &[]);
    let right = |server: &ApiServer| text(server, "culvert-system") == Some(pem_of(&root));
    server.until("published", right).await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    server.put(&format!(
        "{{apiVersion: v1, kind: ConfigMap, metadata: {{name: {CONFIG_MAP}, namespace: culvert-system}}, data: {{{KEY}: forged}}}}"
    ));
    assert!(!right(&server));
    server.until("put right", right).await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    server.delete("", "configmaps", "culvert-system", CONFIG_MAP);
    server.until("made again", right).await;
}

#[tokio::test(start_paused = true)]
async fn the_trust_bundle_is_published_where_the_api_has_it() {
    let (server, root) = (ApiServer::new(), root());
    server.offer("certificates.k8s.io", "v1beta1", &["clustertrustbundles"]);
    let _published = publish(&server, std::slice::from_ref(&root), &[]);
    let bundle = |server: &ApiServer| server.object("certificates.k8s.io", "clustertrustbundles", "", TRUST_BUNDLE);
    server.until("published", |server| bundle(server).is_some()).await;
    let spec = &bundle(&server).unwrap()["spec"];
    assert_eq!((&spec["signerName"], &spec["trustBundle"]), (&Value::from(SIGNER), &Value::from(pem_of(&root))));
}

#[tokio::test(start_paused = true)]
async fn a_trust_bundle_that_somebody_changes_or_removes_is_put_right_and_one_that_the_api_comes_to_have_is_published() {
    let (server, root) = (ApiServer::new(), root());
    let _published = publish(&server, std::slice::from_ref(&root), &[]);
    let right = |server: &ApiServer| {
        let bundle = server.object("certificates.k8s.io", "clustertrustbundles", "", TRUST_BUNDLE);
        bundle.is_some_and(|bundle| bundle["spec"]["trustBundle"] == pem_of(&root))
    };
    server.until("the roots are published without it", |server| server.all("configmaps").len() == 1).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    server.offer("certificates.k8s.io", "v1beta1", &["clustertrustbundles"]);
    server.until("published", right).await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    let patches = server.requests("PATCH");
    server.put(&format!(
        "{{apiVersion: certificates.k8s.io/v1beta1, kind: ClusterTrustBundle, metadata: {{name: '{TRUST_BUNDLE}'}}, \
         spec: {{signerName: {SIGNER}, trustBundle: forged}}}}"
    ));
    assert!(!right(&server));
    server.until("put right", right).await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    server.delete("certificates.k8s.io", "clustertrustbundles", "", TRUST_BUNDLE);
    server.until("made again", right).await;
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(server.requests("PATCH"), patches + 2, "it is written when it differs, and not otherwise");
}

#[tokio::test(start_paused = true)]
async fn two_replicas_leave_each_other_alone_and_an_api_server_that_is_down_is_waited_for() {
    let (server, old, new) = (ApiServer::new(), root(), root());
    server.set_down(true);
    let (one, other) =
        (publish(&server, std::slice::from_ref(&old), &["shop"]), publish(&server, std::slice::from_ref(&old), &["shop"]));
    tokio::time::sleep(Duration::from_secs(60)).await;
    server.set_down(false);
    server.until("published", |server| server.all("configmaps").len() == 2).await;
    for published in [&one, &other] {
        published.roots.send_replace([new.clone()].into());
    }
    server.until("the new root", |server| text(server, "shop") == Some(pem_of(&new))).await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    let before = server.requests("PATCH");
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(server.requests("PATCH"), before);
}
