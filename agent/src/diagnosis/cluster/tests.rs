use std::time::Duration;

use super::*;
use crate::diagnosis::{Severity, worst};
use crate::installation::Values;
use crate::installation::chart::NAMESPACE;
use crate::installation::fake_api::FakeApi;
use crate::installation::install::{Installation, install};

/// When the fake API server lives.
fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_000)
}

fn root(pem: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "culvert-root-cert", "namespace": NAMESPACE},
        "data": {"root-cert.pem": pem},
    })
}

fn pod(name: &str, namespace: &str, labels: Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {"nodeName": "node-a"},
        "status": {"phase": "Running"},
    })
}

/// A cluster in which all is well: one node, one agent, one pod in the mesh.
async fn healthy() -> FakeApi {
    let key = rcgen::KeyPair::generate().expect("a key");
    let pem = rcgen::CertificateParams::default().self_signed(&key).expect("a certificate").pem();
    let labels = |name: &str| json!({"app.kubernetes.io/name": name, "app.kubernetes.io/version": "0.1.0"});
    let api = FakeApi::with(&[
        json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-a"},
            "status": {"nodeInfo": {"kernelVersion": "6.1.0", "architecture": "amd64", "operatingSystem": "linux"}},
        }),
        json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "node-a", "namespace": "kube-node-lease"},
            "spec": {"renewTime": "1970-01-01T00:16:35.000000Z"},
        }),
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop", "labels": {"culvert.dev/mesh": "enabled"}}}),
        root(&pem),
        pod("cart", "shop", json!({})),
        pod("agent-1", NAMESPACE, labels("culvert-agent")),
        pod("controller-1", NAMESPACE, labels("culvert-controller")),
    ]);
    api.serve(&metrics_of("agent-1"), "culvert_enrolled_pods 1\nculvert_xds_connected 1\n");
    let values = Values::merge(&[], &[]).expect("values");
    let installation = Installation { values, namespace: NAMESPACE.to_owned(), definitions: true, limit: Duration::from_secs(5) };
    install(&api.cluster().await, &installation, |_| {}).await.expect("installed");
    api
}

fn metrics_of(pod: &str) -> String {
    format!("/api/v1/namespaces/{NAMESPACE}/pods/{pod}:15020/proxy/metrics")
}

async fn findings(api: &FakeApi) -> Vec<Finding> {
    check(&api.cluster().await, NAMESPACE, now()).await
}

#[track_caller]
fn has(findings: &[Finding], severity: Severity, word: &str) {
    let found = findings.iter().any(|finding| finding.severity == severity && finding.message.contains(word));
    assert!(found, "no {severity:?} with `{word}` in {findings:#?}");
}

#[tokio::test(start_paused = true)]
async fn a_healthy_cluster_has_no_errors_and_each_check_says_so() {
    let findings = findings(&healthy().await).await;
    assert_ne!(worst(&findings), Severity::Error, "{findings:#?}");
    let checks: BTreeSet<_> = findings.iter().map(|finding| finding.check).collect();
    for name in [
        "agents",
        "certificates",
        "clock",
        "controller",
        "definitions",
        "enrolment",
        "nodes",
        "permissions",
        "policies",
        "versions",
    ] {
        assert!(checks.contains(name), "no {name} in {checks:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_empty_cluster_is_told_to_be_without_culvert() {
    let findings = findings(&FakeApi::default()).await;
    has(&findings, Severity::Error, "there is no culvert-controller");
    has(&findings, Severity::Error, "there is no culvert-agent");
    has(&findings, Severity::Error, "there is no ConfigMap culvert-system/culvert-root-cert");
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_is_not_captured_and_an_agent_alone_are_errors() {
    let api = healthy().await;
    api.serve(&metrics_of("agent-1"), "culvert_enrolled_pods 0\nculvert_xds_connected 0\n");
    let findings = findings(&api).await;
    has(&findings, Severity::Error, "1 running pods on node-a are enrolled by label, and 0 are captured");
    has(&findings, Severity::Error, "the agent on node-a has no connection to a controller");
}

#[tokio::test(start_paused = true)]
async fn what_may_not_be_read_is_a_warning_and_the_rest_is_looked_at() {
    let api = healthy().await;
    api.forbid("/api/v1/nodes");
    api.forbid(&metrics_of("agent-1"));
    let findings = findings(&api).await;
    has(&findings, Severity::Warning, "listing Node");
    has(&findings, Severity::Warning, "1 agents could not be asked for their metrics");
    has(&findings, Severity::Ok, "the root certificate is good");
}

#[tokio::test(start_paused = true)]
async fn a_policy_that_cannot_be_enforced_is_a_warning_with_its_field() {
    let api = healthy().await;
    let policy = json!({
        "apiVersion": "security.istio.io/v1",
        "kind": "PeerAuthentication",
        "metadata": {"name": "ports", "namespace": "shop"},
        "spec": {"portLevelMtls": {"8080": {"mode": "DISABLE"}}},
    });
    api.cluster().await.apply(&policy).await.expect("applied");
    has(&findings(&api).await, Severity::Warning, "PeerAuthentication shop/ports: spec.portLevelMtls");
}
