//! Who may do what in the API, and the tokens that prove it.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{Cluster, kubectl, run};

impl Cluster {
    /// Makes a service account.
    pub fn account(&self, namespace: &str, name: &str) {
        self.apply(&json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": namespace}}));
    }

    /// A token of a service account, as the kubelet gets it for a pod: for one audience, and bound to the pod, if there is one.
    ///
    /// # Panics
    /// When the API server gives none.
    #[must_use]
    pub fn token(&self, namespace: &str, account: &str, pod: Option<&str>, audience: &str) -> String {
        let bound = pod.map(|pod| json!({"apiVersion": "v1", "kind": "Pod", "name": pod}));
        let request = json!({
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"audiences": [audience], "expirationSeconds": 600, "boundObjectRef": bound},
        });
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token");
        let answer = run(kubectl().args(["create", "--raw", &path, "--filename=-"]), &request.to_string());
        let answer: Value = serde_json::from_str(&answer.expect("the API server gives a token")).expect("JSON");
        answer["status"]["token"].as_str().expect("a token is a string").to_owned()
    }

    /// All that a user may do in a namespace by the API server's rules, one right a text: the verbs, the resource and, where it is not for
    /// all, the name. Paths that are no resources are left out.
    ///
    /// # Panics
    /// When kubectl writes its list in a way that is not known.
    #[must_use]
    pub fn rights(&self, user: &str, namespace: &str) -> BTreeSet<String> {
        let list = self.kubectl(&["--namespace", namespace, "--as", user, "auth", "can-i", "--list", "--no-headers"]);
        let right = |line: &str| {
            let mut parts = line.split('[');
            let (resource, _paths) = (parts.next()?.trim(), parts.next()?);
            let mut lists = parts.map(|part| part.trim().trim_end_matches(']'));
            let (name, verbs) = (lists.next()?, lists.next()?);
            (!resource.is_empty()).then(|| format!("{verbs} {resource} {name}").trim_end().to_owned())
        };
        list.lines().filter(|line| !line.contains("[/")).map(|line| right(line).unwrap_or_else(|| panic!("{line}"))).collect()
    }

    /// Whether a user may.
    #[must_use]
    pub fn may(&self, user: &str, namespace: &str, verb: &str, object: &str) -> bool {
        self.try_kubectl(&["--namespace", namespace, "--as", user, "auth", "can-i", verb, object]).is_ok()
    }
}

/// A service account's name as a user of the API.
#[must_use]
pub fn user(namespace: &str, account: &str) -> String {
    format!("system:serviceaccount:{namespace}:{account}")
}
