//! Promise: whoever is to trust the mesh finds its roots: as a ConfigMap in each namespace of the mesh and in no other, and as a
//! ClusterTrustBundle where the API has them; and what somebody changes or removes of that is put right.

use std::collections::BTreeSet;

use harness::cluster::{CULVERT, ENROLLED, IMAGE, PodSpec, not_run};
use harness::{Cluster, eventually};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
use serde_json::json;

const CONFIG_MAP: &str = "culvert-root-cert";
const BUNDLE: &str = "culvert.dev:mesh:root";
const SIGNER: &str = "culvert.dev/mesh";

/// The certificates of a text, each without its line breaks: whoever hands it on may wrap and order them anew.
fn certificates(text: &str) -> BTreeSet<String> {
    let certificates = text.split("-----BEGIN CERTIFICATE-----").skip(1);
    certificates
        .map(|certificate| certificate.split("-----END").next().unwrap_or_default().split_whitespace().collect())
        .collect()
}

/// A root of somebody else's: the API server takes only those of authorities.
fn another_root() -> String {
    let mut root = CertificateParams::default();
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    root.self_signed(&KeyPair::generate().expect("a key")).expect("a certificate").pem()
}

/// What is published in a namespace, if anything is.
fn published(cluster: Cluster, namespace: &str) -> Option<String> {
    let maps = cluster.list(namespace, "configmaps");
    let map = maps.iter().find(|map| map["metadata"]["name"] == CONFIG_MAP)?;
    map["data"]["root-cert.pem"].as_str().map(str::to_owned)
}

#[test]
fn the_roots_are_in_each_namespace_of_the_mesh_and_in_no_other() {
    let cluster = Cluster;
    let node = &cluster.nodes()[0];
    let mesh = cluster.namespace("roots", &[ENROLLED]);
    let plain = cluster.namespace("roots-plain", &[]);
    let pods = [mesh.name(), plain.name()].map(|namespace| PodSpec::new(namespace, "pod", node));
    cluster.pods(&pods);
    let roots = published(cluster, CULVERT).expect("the roots are where Culvert is");
    assert!(!certificates(&roots).is_empty(), "{roots}");
    eventually("the roots are in a namespace of the mesh", || published(cluster, mesh.name()).as_ref() == Some(&roots));
    assert_eq!(published(cluster, plain.name()), None);
    let forgery = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": CONFIG_MAP, "namespace": mesh.name()},
        "data": {"root-cert.pem": "forged"},
    });
    cluster.kubectl(&["--namespace", mesh.name(), "delete", "configmap", CONFIG_MAP]);
    cluster.apply(&forgery);
    eventually("the roots are put right", || published(cluster, mesh.name()).as_ref() == Some(&roots));
}

#[test]
fn a_pod_reads_the_roots_of_a_trust_bundle_which_is_put_right_when_somebody_changes_or_removes_it() {
    let cluster = Cluster;
    if !cluster.offers("clustertrustbundles.certificates.k8s.io") {
        return not_run("this API server offers no ClusterTrustBundles");
    }
    let node = &cluster.nodes()[0];
    let namespace = cluster.namespace("trusting", &[]);
    let roots = certificates(&published(cluster, CULVERT).expect("the roots are where Culvert is"));
    let bundle = || {
        let bundles = cluster.list("", "clustertrustbundles");
        let bundle = bundles.iter().find(|bundle| bundle["metadata"]["name"] == BUNDLE)?;
        Some((bundle["spec"]["signerName"].clone(), certificates(bundle["spec"]["trustBundle"].as_str()?)))
    };
    let is_right = || bundle() == Some((json!(SIGNER), roots.clone()));
    assert!(is_right(), "{:?} is published, not {roots:?}", bundle());

    let mut reader = PodSpec::new(namespace.name(), "reader", node);
    // By the signer: what kubelet has read by the name it hands on for some minutes, whatever becomes of the object.
    let source = json!({"clusterTrustBundle": {"signerName": SIGNER, "labelSelector": {}, "path": "roots.pem"}});
    reader.more = json!({
        "volumes": [{"name": "roots", "projected": {"sources": [source]}}],
        "containers": [{
            "name": "app", "image": IMAGE, "args": ["serve"], "volumeMounts": [{"name": "roots", "mountPath": "/roots"}],
        }],
    });
    if cluster.keeps(&reader.object(), "/spec/volumes/0/projected/sources/0/clusterTrustBundle/signerName") {
        cluster.pods(&[reader]);
        let read = cluster.exec(namespace.name(), "reader", &["cat", "/roots/roots.pem"]).expect("the volume has the roots");
        assert_eq!(certificates(&read), roots);
    } else {
        not_run("this API server offers no volumes of ClusterTrustBundles: the object alone was looked at");
    }

    cluster.kubectl(&["delete", "clustertrustbundle", BUNDLE]);
    eventually("the bundle is made again", is_right);
    let patch = json!({"spec": {"trustBundle": another_root()}}).to_string();
    cluster.kubectl(&["patch", "clustertrustbundle", BUNDLE, "--type=merge", "--patch", &patch]);
    eventually("the bundle is put right", is_right);
}
