use serde_json::json;

use super::*;
use crate::installation::Values;
use crate::installation::chart::NAMESPACE;
use crate::installation::fake_api::FakeApi;
use crate::installation::install::{Installation, install};

fn removal() -> Removal {
    Removal { namespace: NAMESPACE.to_owned(), limit: Duration::from_secs(30) }
}

fn object(api_version: &str, kind: &str, namespace: Option<&str>, name: &str) -> Value {
    let mut object = json!({"apiVersion": api_version, "kind": kind, "metadata": {"name": name}});
    if let Some(namespace) = namespace {
        object["metadata"]["namespace"] = namespace.into();
    }
    object
}

/// Two nodes with what a user has of his own, and Culvert with what its controller made.
async fn installed() -> FakeApi {
    let api = FakeApi::with(&[
        object("v1", "Node", None, "node-a"),
        object("v1", "Node", None, "node-b.example"),
        object("v1", "Namespace", None, "shop"),
        object("v1", "ConfigMap", Some("shop"), "settings"),
        object("v1", "ConfigMap", Some("shop"), "culvert-root-cert"),
        object("v1", "ConfigMap", Some(NAMESPACE), "culvert-root-cert"),
        object("v1", "Secret", Some(NAMESPACE), "culvert-ca"),
        object("rbac.authorization.k8s.io/v1", "ClusterRole", None, "view"),
    ]);
    let values = Values::merge(&[], &["namespace.create=true".to_owned()]).expect("values");
    let limit = Duration::from_secs(30);
    let installation = Installation { values, namespace: NAMESPACE.to_owned(), definitions: true, limit };
    install(&api.cluster().await, &installation, |_| {}).await.expect("installed");
    api.take_changes();
    api
}

async fn run(api: &FakeApi) -> Outcome {
    uninstall(&api.cluster().await, &removal(), |_| {}).await.expect("tried")
}

#[tokio::test(start_paused = true)]
async fn nothing_but_what_the_user_had_is_left() {
    let api = installed().await;
    let outcome = run(&api).await;
    assert!(outcome.failures.is_empty() && outcome.kept.is_empty(), "{outcome:?}");
    let left: Vec<String> = api.objects().into_iter().collect();
    assert_eq!(left, ["ClusterRole view", "ConfigMap shop/settings", "Namespace shop", "Node node-a", "Node node-b.example"]);
}

#[tokio::test(start_paused = true)]
async fn the_end_is_told_when_the_namespace_is_gone_so_that_culvert_can_be_installed_again_at_once() {
    let api = installed().await;
    api.linger(3);
    let outcome = run(&api).await;
    assert!(outcome.failures.is_empty() && outcome.kept.is_empty(), "{outcome:?}");
    assert!(api.object("Namespace", NAMESPACE).is_none());
}

#[tokio::test(start_paused = true)]
async fn agents_end_before_nodes_are_cleaned_and_their_account_goes_after() {
    let api = installed().await;
    run(&api).await;
    let changes = api.take_changes();
    let at = |method: &str, part: &str| {
        let found = changes.iter().position(|(known, path)| known.as_str() == method && path.ends_with(part));
        found.unwrap_or_else(|| panic!("no {method} of {part} in {changes:?}"))
    };
    assert!(at("DELETE", "daemonsets/culvert-agent") < at("PATCH", "pods/culvert-leave-node-a"));
    assert!(at("PATCH", "pods/culvert-leave-node-b.example") < at("DELETE", "clusterroles/culvert-controller"));
    assert!(at("DELETE", "deployments/culvert-controller") < at("DELETE", "configmaps/culvert-root-cert"));
    assert!(at("DELETE", "pods/culvert-leave-node-a") < at("DELETE", "namespaces/culvert-system"));
}

#[tokio::test(start_paused = true)]
async fn a_node_that_cannot_be_cleaned_is_named_and_the_rest_is_done() {
    let api = installed().await;
    api.get_stuck();
    let outcome = run(&api).await;
    assert!(outcome.failures.iter().any(|failure| failure.starts_with("node node-a was not cleaned")), "{outcome:?}");
    assert!(api.object("ClusterRole", "culvert-controller").is_none());
    // What a next try needs.
    assert!(api.object("Namespace", NAMESPACE).is_some());
}

#[tokio::test(start_paused = true)]
async fn policies_the_users_authority_and_foreign_namespaces_are_kept_and_named() {
    let api = installed().await;
    let cluster = api.cluster().await;
    let policy = object("security.istio.io/v1", "PeerAuthentication", Some("shop"), "default");
    cluster.apply(&policy).await.expect("applied");
    cluster.apply(&object("v1", "Secret", Some(NAMESPACE), "cacerts")).await.expect("applied");
    let outcome = run(&api).await;
    assert!(outcome.failures.is_empty(), "{outcome:?}");
    assert!(
        outcome.kept.iter().any(|kept| kept.starts_with("the kind PeerAuthentication, with 1 objects of yours")),
        "{outcome:?}"
    );
    assert!(outcome.kept.iter().any(|kept| kept.contains("your Secret cacerts")), "{outcome:?}");
    assert!(api.object("PeerAuthentication", "default").is_some() && api.object("Secret", "cacerts").is_some());
    assert!(api.object("Secret", "culvert-ca").is_none());
}

#[tokio::test(start_paused = true)]
async fn uninstalling_what_is_not_there_is_no_failure() {
    let api = FakeApi::with(&[object("v1", "Node", None, "node-a"), object("v1", "Namespace", None, NAMESPACE)]);
    let outcome = run(&api).await;
    assert!(outcome.failures.is_empty(), "{outcome:?}");
    assert_eq!(outcome.kept, ["the namespace culvert-system, which Culvert did not make"]);
}
