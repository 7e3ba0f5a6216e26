//! An API server in memory, for tests: it keeps what it is given, and does at once what controllers and kubelets would do.

use std::collections::{BTreeMap, BTreeSet};
use std::future::{Ready, ready};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};

use futures_util::FutureExt as _;
use http::{Method, Request, Response, StatusCode};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tower_service::Service;

use super::cluster::{Cluster, ObjectRef};

/// Kinds: version, plural, kind, and whether its objects are in namespaces.
const KINDS: [(&str, &str, &str, bool); 20] = [
    ("v1", "configmaps", "ConfigMap", true),
    ("v1", "namespaces", "Namespace", false),
    ("v1", "nodes", "Node", false),
    ("v1", "pods", "Pod", true),
    ("v1", "resourcequotas", "ResourceQuota", true),
    ("v1", "secrets", "Secret", true),
    ("v1", "serviceaccounts", "ServiceAccount", true),
    ("v1", "services", "Service", true),
    ("apps/v1", "daemonsets", "DaemonSet", true),
    ("apps/v1", "deployments", "Deployment", true),
    ("apiextensions.k8s.io/v1", "customresourcedefinitions", "CustomResourceDefinition", false),
    ("authorization.k8s.io/v1", "subjectaccessreviews", "SubjectAccessReview", false),
    ("coordination.k8s.io/v1", "leases", "Lease", true),
    ("networking.k8s.io/v1", "networkpolicies", "NetworkPolicy", true),
    ("policy/v1beta1", "poddisruptionbudgets", "PodDisruptionBudget", true),
    ("rbac.authorization.k8s.io/v1", "clusterroles", "ClusterRole", false),
    ("rbac.authorization.k8s.io/v1", "clusterrolebindings", "ClusterRoleBinding", false),
    ("rbac.authorization.k8s.io/v1", "roles", "Role", true),
    ("rbac.authorization.k8s.io/v1", "rolebindings", "RoleBinding", true),
    ("security.istio.io/v1", "peerauthentications", "PeerAuthentication", true),
];

/// The server. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct FakeApi(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    objects: BTreeMap<String, Value>,
    version: u64,
    /// Requests that changed something, in order: the method and the path.
    changes: Vec<(Method, String)>,
    /// Paths at which nothing may be done.
    forbidden: BTreeSet<String>,
    /// Workloads and pods that never get anywhere.
    stuck: bool,
    /// How often a namespace is still seen after its removal.
    lingers: u32,
    /// Texts by path.
    texts: BTreeMap<String, String>,
}

impl FakeApi {
    /// A server with these objects.
    pub(crate) fn with(objects: &[Value]) -> Self {
        let api = Self::default();
        for object in objects {
            let path = api.path(object);
            api.state().keep(&path, object.clone());
        }
        api
    }

    /// A cluster that asks this server.
    pub(crate) async fn cluster(&self) -> Cluster {
        Cluster::ask(Client::new(self.clone(), "default")).await.expect("the server answers")
    }

    /// From now on whoever asks for this path is told that he may not.
    pub(crate) fn forbid(&self, path: &str) {
        self.state().forbidden.insert(path.to_owned());
    }

    /// From now on nothing becomes ready, and no pod ends.
    pub(crate) fn get_stuck(&self) {
        self.state().stuck = true;
    }

    /// From now on a namespace that is removed is still there when it is asked for, so many times.
    pub(crate) fn linger(&self, times: u32) {
        self.state().lingers = times;
    }

    /// Serves a text at a path.
    pub(crate) fn serve(&self, path: &str, text: &str) {
        self.state().texts.insert(path.to_owned(), text.to_owned());
    }

    /// What is there, by kind and name.
    pub(crate) fn objects(&self) -> BTreeSet<String> {
        self.state().objects.values().map(|object| ObjectRef::of(object).to_string()).collect()
    }

    /// An object that is there.
    pub(crate) fn object(&self, kind: &str, name: &str) -> Option<Value> {
        let state = self.state();
        state.objects.values().find(|object| object["kind"] == kind && object["metadata"]["name"] == name).cloned()
    }

    /// The requests that changed something, since the last call.
    pub(crate) fn take_changes(&self) -> Vec<(Method, String)> {
        std::mem::take(&mut self.state().changes)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no test panics while it holds this")
    }

    fn path(&self, object: &Value) -> String {
        let found = KINDS.iter().find(|(version, _, kind, _)| object["apiVersion"] == **version && object["kind"] == **kind);
        let (version, plural, _, namespaced) = found.unwrap_or_else(|| panic!("the fake knows no such kind: {object}"));
        let root = if version.contains('/') { "apis" } else { "api" };
        let text = |value: &Value| value.as_str().expect("a text").to_owned();
        let inside = if *namespaced { format!("namespaces/{}/", text(&object["metadata"]["namespace"])) } else { String::new() };
        format!("/{root}/{version}/{inside}{plural}/{}", text(&object["metadata"]["name"]))
    }

    fn answer(&self, method: &Method, path: &str, query: &str, body: &[u8]) -> (StatusCode, String) {
        let mut state = self.state();
        if state.forbidden.contains(path) {
            return status(StatusCode::FORBIDDEN, &format!("{path} is forbidden"));
        }
        if let Some(text) = state.texts.get(path) {
            return (StatusCode::OK, text.clone());
        }
        if let Some(found) = discovery(path) {
            return (StatusCode::OK, found.to_string());
        }
        if *method != Method::GET {
            state.changes.push((method.clone(), path.to_owned()));
        }
        let (code, value) = match *method {
            Method::GET => match state.look(path) {
                Some(object) => (StatusCode::OK, object),
                None => match state.list(path, query) {
                    Some(list) => return (StatusCode::OK, list),
                    None => return status(StatusCode::NOT_FOUND, &format!("{path} not found")),
                },
            },
            Method::POST => {
                let object: Value = serde_json::from_slice(body).expect("JSON");
                if object["kind"] == "SubjectAccessReview" {
                    (StatusCode::CREATED, json!({"kind": "SubjectAccessReview", "status": {"allowed": true}}))
                } else {
                    let path = format!("{path}/{}", object["metadata"]["name"].as_str().expect("a name"));
                    (StatusCode::CREATED, state.keep(&path, object))
                }
            }
            Method::PATCH => (StatusCode::OK, state.keep(path, serde_json::from_slice(body).expect("JSON"))),
            Method::DELETE => match state.remove(path) {
                Some(object) => (StatusCode::OK, object),
                None => return status(StatusCode::NOT_FOUND, &format!("{path} not found")),
            },
            _ => return status(StatusCode::METHOD_NOT_ALLOWED, "the fake does not know this method"),
        };
        (code, value.to_string())
    }
}

impl State {
    /// An object, which may be on its way out.
    fn look(&mut self, path: &str) -> Option<Value> {
        let found = self.objects.get(path)?.clone();
        if !found["metadata"]["deletionTimestamp"].is_null() {
            self.lingers -= 1;
            if self.lingers == 0 {
                self.objects.remove(path);
            }
        }
        Some(found)
    }

    fn remove(&mut self, path: &str) -> Option<Value> {
        let found = self.objects.get_mut(path)?;
        if found["kind"] == "Namespace" && self.lingers > 0 {
            found["metadata"]["deletionTimestamp"] = "1970-01-01T00:16:40Z".into();
            return Some(found.clone());
        }
        self.objects.remove(path)
    }

    /// Keeps an object, with what controllers and kubelets would add.
    fn keep(&mut self, path: &str, mut object: Value) -> Value {
        let before = self.objects.get(path);
        let same = before.is_some_and(|before| before["spec"] == object["spec"] && before["rules"] == object["rules"]);
        if !same {
            self.version += 1;
        }
        let version = before
            .filter(|_| same)
            .map_or_else(|| json!(self.version.to_string()), |before| before["metadata"]["resourceVersion"].clone());
        object["metadata"]["resourceVersion"] = version;
        object["metadata"]["generation"] = 1.into();
        if !self.stuck {
            match object["kind"].as_str() {
                Some("Deployment") => {
                    let count = object["spec"]["replicas"].clone();
                    object["status"] =
                        json!({"observedGeneration": 1, "replicas": count, "updatedReplicas": count, "availableReplicas": count});
                }
                Some("DaemonSet") => {
                    object["status"] = json!({"observedGeneration": 1, "desiredNumberScheduled": 1, "updatedNumberScheduled": 1, "numberAvailable": 1});
                }
                Some("Pod") if object["status"].is_null() => object["status"] = json!({"phase": "Succeeded"}),
                _ => {}
            }
        }
        self.objects.insert(path.to_owned(), object.clone());
        object
    }

    /// A list, or the beginning of a watch, at a collection's path.
    fn list(&self, path: &str, query: &str) -> Option<String> {
        let query = query.replace("%3D", "=").replace("%2F", "/").replace("%3A", ":");
        let part = |name: &str| query.split('&').find_map(|part| part.strip_prefix(name)).unwrap_or_default().to_owned();
        let (labels, fields) = (part("labelSelector="), part("fieldSelector="));
        let (_, plural) = path.rsplit_once('/')?;
        let (version, .., namespaced) = KINDS.iter().find(|(version, known, ..)| *known == plural && path.contains(version))?;
        let everywhere = *namespaced && !path.contains("/namespaces/");
        let items = self.objects.iter().filter(|(key, object)| {
            let below = if everywhere {
                key.contains(&format!("/{version}/")) && key.contains(&format!("/{plural}/"))
            } else {
                key.strip_prefix(path).is_some_and(|rest| rest.starts_with('/'))
            };
            let labelled = labels.split_once('=').is_none_or(|(name, value)| object["metadata"]["labels"][name] == value);
            let named = fields.strip_prefix("metadata.name=").is_none_or(|name| object["metadata"]["name"] == name);
            below && labelled && named
        });
        let items: Vec<&Value> = items.map(|(_, object)| object).collect();
        if query.contains("watch=true") {
            return Some(items.iter().map(|object| format!("{}\n", json!({"type": "ADDED", "object": object}))).collect());
        }
        Some(json!({"kind": "List", "metadata": {}, "items": items}).to_string())
    }
}

/// What the server offers.
fn discovery(path: &str) -> Option<Value> {
    let resources = |wanted: &str| {
        let of_version = KINDS.iter().filter(|(version, ..)| *version == wanted);
        let resources = of_version.map(|(_, plural, kind, namespaced)| {
            json!({"name": plural, "singularName": "", "namespaced": namespaced, "kind": kind, "verbs": []})
        });
        json!({"kind": "APIResourceList", "groupVersion": wanted, "resources": resources.collect::<Vec<_>>()})
    };
    match path {
        "/version" => Some(json!({"major": "1", "minor": "20"})),
        "/api/v1" => Some(resources("v1")),
        "/apis" => {
            let versions: BTreeSet<&str> =
                KINDS.iter().map(|(version, ..)| *version).filter(|version| version.contains('/')).collect();
            let groups = versions.iter().map(|version| {
                let (group, number) = version.split_once('/').expect("a group");
                let version = json!({"groupVersion": version, "version": number});
                json!({"name": group, "versions": [version], "preferredVersion": version})
            });
            Some(json!({"kind": "APIGroupList", "groups": groups.collect::<Vec<_>>()}))
        }
        _ => path.strip_prefix("/apis/").filter(|version| KINDS.iter().any(|(known, ..)| known == version)).map(resources),
    }
}

fn status(code: StatusCode, message: &str) -> (StatusCode, String) {
    let status = json!({"kind": "Status", "status": "Failure", "message": message, "reason": "Fake", "code": code.as_u16()});
    (code, status.to_string())
}

impl Service<Request<Body>> for FakeApi {
    type Response = Response<Body>;
    type Error = std::convert::Infallible;
    type Future = Ready<Result<Response<Body>, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let (parts, body) = request.into_parts();
        // A body that is whole is read without waiting.
        let body = body.collect_bytes().now_or_never().expect("whole").expect("no error");
        let (code, text) = self.answer(&parts.method, parts.uri.path(), parts.uri.query().unwrap_or_default(), &body);
        let answer =
            Response::builder().status(code).header("date", "Thu, 01 Jan 1970 00:16:40 GMT").body(Body::from(text.into_bytes()));
        ready(Ok(answer.expect("a legal response")))
    }
}
