//! Promise: in the API each part of Culvert may do what it needs and nothing else, and the mesh's private key is the controller's alone.

use std::collections::BTreeSet;

use harness::Cluster;
use harness::cluster::{CULVERT, ENROLLED, user};

/// All that the controller may do, anywhere.
const EVERYWHERE: [&str; 15] = [
    "create tokenreviews.authentication.k8s.io",
    "get list watch namespaces",
    "get list watch nodes",
    "get list watch pods",
    "get list watch serviceaccounts",
    "get list watch services",
    "get list watch endpointslices.discovery.k8s.io",
    "get list watch authorizationpolicies.security.istio.io",
    "get list watch peerauthentications.security.istio.io",
    "update authorizationpolicies.security.istio.io/status",
    "update peerauthentications.security.istio.io/status",
    "create patch events",
    "list watch create patch configmaps culvert-root-cert",
    "list watch create patch clustertrustbundles.certificates.k8s.io culvert.dev:mesh:root",
    "attest signers.certificates.k8s.io culvert.dev/mesh",
];
/// And in its own namespace.
const AT_HOME: [&str; 3] = ["create secrets", "get list watch secrets cacerts", "get list watch secrets culvert-ca"];
/// The mesh's private key is in it.
const KEY: &str = "secret/culvert-ca";

#[test]
fn controller_and_agents_may_do_what_they_need_and_nothing_else() {
    let cluster = Cluster;
    let namespace = cluster.namespace("rights", &[ENROLLED]);
    for (place, more) in [(namespace.name(), &[] as &[&str]), (CULVERT, &AT_HOME)] {
        // What every account may do in any cluster: to ask what it may.
        let anybody = cluster.rights(&user(place, "default"), place);
        assert_eq!(cluster.rights(&user(CULVERT, "culvert-agent"), place), anybody, "agents, in {place}");
        let controller = cluster.rights(&user(CULVERT, "culvert-controller"), place);
        assert!(controller.is_superset(&anybody), "{controller:?}");
        let own: BTreeSet<String> = controller.difference(&anybody).cloned().collect();
        let wanted: BTreeSet<String> = EVERYWHERE.iter().chain(more).map(|right| (*right).to_owned()).collect();
        assert_eq!(own, wanted, "the controller, in {place}");
    }
}

#[test]
fn the_private_key_is_the_controllers_alone() {
    let cluster = Cluster;
    let namespace = cluster.namespace("key", &[ENROLLED]);
    let controller = user(CULVERT, "culvert-controller");
    assert!(cluster.may(&controller, CULVERT, "get", KEY), "the controller reads the key");
    let mut others: Vec<String> = Vec::new();
    for account in cluster.list_everywhere("serviceaccounts") {
        let field = |name: &str| account["metadata"][name].as_str().unwrap_or_default().to_owned();
        // The accounts of Kubernetes' own controllers are there; the garbage collector reads everything.
        if field("namespace") != "kube-system" {
            others.push(user(&field("namespace"), &field("name")));
        }
    }
    others.retain(|other| *other != controller);
    for expected in [user(CULVERT, "culvert-agent"), user(CULVERT, "default"), user(namespace.name(), "default")] {
        assert!(others.contains(&expected), "{expected} is not among {others:?}");
    }
    others.extend(["system:anonymous".to_owned(), "somebody".to_owned()]);
    for other in &others {
        for verb in ["get", "list", "watch", "update", "patch", "delete"] {
            assert!(!cluster.may(other, CULVERT, verb, KEY), "{other} may {verb} the key");
        }
    }
    for verb in ["update", "patch", "delete"] {
        assert!(!cluster.may(&controller, CULVERT, verb, KEY), "the controller may {verb} the key: it makes one, once");
    }
    for right in ["secret", "secret/another"] {
        assert!(!cluster.may(&controller, CULVERT, "get", right), "the controller may get {right}");
        assert!(!cluster.may(&controller, namespace.name(), "get", right), "the controller may get {right} of other namespaces");
    }

    // Not only by what the API server says of its rules.
    let words = ["--namespace", CULVERT, "get", KEY, "--output=name"];
    cluster.kubectl(&[&["--as", controller.as_str()], words.as_slice()].concat());
    let node = format!("system:node:{}", cluster.nodes()[0]);
    for other in [&["--as", others[0].as_str()] as &[&str], &["--as", &node, "--as-group", "system:nodes"]] {
        let refused = cluster.try_kubectl(&[other, words.as_slice()].concat()).expect_err("the key is not theirs");
        assert!(refused.contains("orbidden"), "{refused}");
    }
    // What is published of it holds no key.
    let published = cluster.get(CULVERT, "configmap", "culvert-root-cert").to_string();
    assert!(published.contains("BEGIN CERTIFICATE") && !published.contains("PRIVATE"), "{published}");
}
