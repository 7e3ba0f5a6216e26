//! A scripted API server inside the test's process: objects with versions, lists in pages, watches, and the ways in which a real
//! one fails.
//!
//! It speaks to the client as a service, so that everything above the socket is real, and time may be paused.

mod route;

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};

use axum::body::{Body, to_bytes};
use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::unfold;
use http::{Method, Request, Response};
use kube::Client;
use serde::Deserialize as _;
use serde_json::{Value, json};
use tokio::sync::watch;
use tower_service::Service;

use self::route::Route;

/// Clones are the same server.
#[derive(Clone)]
pub(in crate::controller) struct ApiServer {
    state: Arc<Mutex<State>>,
    changed: Arc<watch::Sender<()>>,
}

struct State {
    version: u64,
    objects: BTreeMap<Key, Value>,
    log: Vec<Change>,
    /// Versions before this one are forgotten.
    forgotten: u64,
    down: bool,
    /// Watches say nothing.
    held: bool,
    /// The most objects in one page.
    page: usize,
    /// What the next pages after a first one are answered with.
    continued: Result<(), u16>,
    /// Group, version and plurals, with `/status` where there is one.
    offered: Vec<(&'static str, &'static str, Vec<&'static str>)>,
    requests: Vec<String>,
    /// Answers to reviews, by token.
    reviews: BTreeMap<String, Value>,
}

/// Group, plural, namespace, name.
type Key = (String, String, String, String);

#[derive(Clone)]
struct Change {
    version: u64,
    kind: &'static str,
    key: Key,
    object: Value,
}

impl ApiServer {
    /// A server like a recent one, without definitions of policies.
    pub(in crate::controller) fn new() -> Self {
        let offered = vec![
            ("discovery.k8s.io", "v1", vec!["endpointslices"]),
            ("discovery.k8s.io", "v1beta1", vec!["endpointslices"]),
            ("authentication.k8s.io", "v1", vec!["tokenreviews"]),
        ];
        let state = State {
            version: 100,
            objects: BTreeMap::new(),
            log: Vec::new(),
            forgotten: 0,
            down: false,
            held: false,
            page: 500,
            continued: Ok(()),
            offered,
            requests: Vec::new(),
            reviews: BTreeMap::new(),
        };
        Self { state: Arc::new(Mutex::new(state)), changed: Arc::new(watch::Sender::new(())) }
    }

    /// A server that has these objects.
    pub(in crate::controller) fn with(manifests: &str) -> Self {
        let server = Self::new();
        server.put(manifests);
        server
    }

    /// A client of it.
    pub(in crate::controller) fn client(&self) -> Client {
        Client::new(self.clone(), "default")
    }

    /// Offers a version of an API.
    pub(in crate::controller) fn offer(&self, group: &'static str, version: &'static str, plurals: &[&'static str]) {
        self.state().offered.push((group, version, plurals.to_vec()));
    }

    /// Offers the policies of Istio.
    pub(in crate::controller) fn offer_policies(&self, version: &'static str) {
        let plurals =
            ["peerauthentications", "peerauthentications/status", "authorizationpolicies", "authorizationpolicies/status"];
        self.offer("security.istio.io", version, &plurals);
    }

    /// Offers a group no more.
    pub(in crate::controller) fn withdraw(&self, group: &str, version: &str) {
        self.state().offered.retain(|(known, of, _)| *known != group || *of != version);
        self.changed.send_replace(());
    }

    /// Adds or replaces all objects of a YAML text.
    pub(in crate::controller) fn put(&self, manifests: &str) {
        for document in serde_yaml_ng::Deserializer::from_str(manifests) {
            let object = Value::deserialize(document).unwrap();
            if object.is_null() {
                continue;
            }
            let key = route::key_of(&object);
            self.state().store(key, object);
        }
        self.changed.send_replace(());
    }

    /// Removes an object.
    pub(in crate::controller) fn delete(&self, group: &str, plural: &str, namespace: &str, name: &str) {
        let key = (group.to_owned(), plural.to_owned(), namespace.to_owned(), name.to_owned());
        self.state().remove(&key);
        self.changed.send_replace(());
    }

    /// An object as it is.
    pub(in crate::controller) fn object(&self, group: &str, plural: &str, namespace: &str, name: &str) -> Option<Value> {
        let key = (group.to_owned(), plural.to_owned(), namespace.to_owned(), name.to_owned());
        self.state().objects.get(&key).cloned()
    }

    /// All objects of a kind.
    pub(in crate::controller) fn all(&self, plural: &str) -> Vec<Value> {
        let state = self.state();
        state.objects.iter().filter(|((_, of, ..), _)| of == plural).map(|(_, object)| object.clone()).collect()
    }

    /// Goes down, or comes back.
    pub(in crate::controller) fn set_down(&self, down: bool) {
        self.state().down = down;
        self.changed.send_replace(());
    }

    /// Has watches say nothing, or go on.
    pub(in crate::controller) fn hold_watches(&self, held: bool) {
        self.state().held = held;
        self.changed.send_replace(());
    }

    /// Forgets all changes up to now, and ends all watches with that.
    pub(in crate::controller) fn forget(&self) {
        let mut state = self.state();
        state.version += 1;
        state.forgotten = state.version;
        state.log.clear();
        drop(state);
        self.changed.send_replace(());
    }

    /// Lists in pages of this length.
    pub(in crate::controller) fn set_page(&self, page: usize) {
        self.state().page = page;
    }

    /// Answers the next page that is asked for with a failure.
    pub(in crate::controller) fn fail_next_page(&self, code: u16) {
        self.state().continued = Err(code);
    }

    /// What a review of this token is answered with.
    pub(in crate::controller) fn answer_review(&self, token: &str, status: Value) {
        self.state().reviews.insert(token.to_owned(), status);
    }

    /// The requests so far that begin like this: method and path.
    pub(in crate::controller) fn requests(&self, prefix: &str) -> usize {
        self.state().requests.iter().filter(|request| request.starts_with(prefix)).count()
    }

    /// Waits until something about the server is so.
    pub(in crate::controller) async fn until(&self, what: &str, mut so: impl FnMut(&Self) -> bool) {
        let mut changed = self.changed.subscribe();
        let wait = async {
            while !so(self) {
                changed.changed().await.unwrap();
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(3600), wait).await.unwrap_or_else(|_| panic!("never: {what}"));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    async fn answer(self, request: Request<kube::client::Body>) -> Result<Response<Body>, io::Error> {
        let (parts, body) = request.into_parts();
        let body = to_bytes(Body::new(body), usize::MAX).await.unwrap();
        let route = Route::parse(&parts.uri);
        let refused = {
            let mut state = self.state();
            state.requests.push(format!("{} {}", parts.method, parts.uri));
            state.down
        };
        if refused {
            return Err(io::Error::new(io::ErrorKind::ConnectionRefused, "the server is down"));
        }
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        if route.query("watch") == Some("true") && self.state().offers(&route) {
            return Ok(self.watch(route));
        }
        let answer = self.state().answer(&parts.method, &route, body);
        self.changed.send_replace(());
        Ok(match answer {
            Ok(value) => respond(200, &value),
            Err((code, reason)) => respond(code, &status(code, reason)),
        })
    }

    fn watch(self, route: Route) -> Response<Body> {
        let position: u64 = route.query("resourceVersion").unwrap_or_default().parse().unwrap();
        let changed = self.changed.subscribe();
        let lines = unfold((self, route, position, changed, false), async |(server, route, mut position, mut changed, ended)| {
            if ended {
                return None;
            }
            loop {
                let line = server.state().next_line(&route, &mut position);
                match line {
                    Ok(Some(line)) => return Some((Ok(line), (server, route, position, changed, false))),
                    Ok(None) => {}
                    Err(WatchEnd::Broken) => {
                        let broken = io::Error::new(io::ErrorKind::ConnectionReset, "the server went down");
                        return Some((Err(broken), (server, route, position, changed, true)));
                    }
                    Err(WatchEnd::Gone) => {
                        let line = line_of("ERROR", &status(410, "Expired"));
                        return Some((Ok(line), (server, route, position, changed, true)));
                    }
                    Err(WatchEnd::Over) => return None,
                }
                changed.changed().await.ok()?;
            }
        });
        Response::new(Body::from_stream(lines))
    }
}

/// How a watch ends.
enum WatchEnd {
    Broken,
    Gone,
    Over,
}

impl State {
    fn store(&mut self, key: Key, mut object: Value) {
        self.version += 1;
        let known = self.objects.get(&key);
        let kind = if known.is_some() { "MODIFIED" } else { "ADDED" };
        let uid = known.map_or_else(|| json!(format!("uid-{}", self.version)), |known| known["metadata"]["uid"].clone());
        let metadata = &mut object["metadata"];
        if metadata["uid"].is_null() {
            metadata["uid"] = uid;
        }
        metadata["resourceVersion"] = json!(self.version.to_string());
        self.log.push(Change { version: self.version, kind, key: key.clone(), object: object.clone() });
        self.objects.insert(key, object);
    }

    fn remove(&mut self, key: &Key) {
        if let Some(mut object) = self.objects.remove(key) {
            self.version += 1;
            object["metadata"]["resourceVersion"] = json!(self.version.to_string());
            self.log.push(Change { version: self.version, kind: "DELETED", key: key.clone(), object });
        }
    }

    fn answer(&mut self, method: &Method, route: &Route, body: Value) -> Result<Value, (u16, &'static str)> {
        if let Some(document) = self.discovery(route)? {
            return Ok(document);
        }
        if !self.offers(route) {
            return Err((404, "NotFound"));
        }
        let key = route.key();
        match (method.as_str(), &key) {
            ("GET", None) => self.list(route),
            ("GET", Some(key)) => self.objects.get(key).map(|object| route.dressed(object)).ok_or((404, "NotFound")),
            ("POST", None) if route.plural == "tokenreviews" => {
                let token = body["spec"]["token"].as_str().unwrap_or_default();
                let unknown = || json!({ "authenticated": false, "error": "unknown token" });
                let status = self.reviews.get(token).cloned().unwrap_or_else(unknown);
                Ok(json!({ "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "status": status }))
            }
            ("POST", None) => {
                let key = route::key_of(&body);
                if self.objects.contains_key(&key) {
                    return Err((409, "AlreadyExists"));
                }
                self.store(key.clone(), body);
                Ok(self.objects[&key].clone())
            }
            ("PUT", Some(key)) => self.replace(key, route, body),
            ("PATCH", Some(key)) => {
                let mut object = self.objects.get(key).cloned().unwrap_or_default();
                let before = object.clone();
                merge(&mut object, body);
                if object != before {
                    self.store(key.clone(), object);
                }
                Ok(self.objects[key].clone())
            }
            _ => Err((405, "MethodNotAllowed")),
        }
    }

    fn replace(&mut self, key: &Key, route: &Route, body: Value) -> Result<Value, (u16, &'static str)> {
        let held = self.objects.get(key).ok_or((404, "NotFound"))?;
        let of = &body["metadata"]["resourceVersion"];
        if !of.is_null() && *of != held["metadata"]["resourceVersion"] {
            return Err((409, "Conflict"));
        }
        let mut object = body;
        if route.status {
            let status = object["status"].take();
            object = held.clone();
            object["status"] = status;
        }
        self.store(key.clone(), object);
        Ok(self.objects[key].clone())
    }

    fn list(&mut self, route: &Route) -> Result<Value, (u16, &'static str)> {
        let mut start = 0;
        if let Some(token) = route.query("continue") {
            std::mem::replace(&mut self.continued, Ok(())).map_err(|code| (code, "Expired"))?;
            start = token.parse().unwrap();
        }
        let limit = route.query("limit").and_then(|limit| limit.parse().ok()).unwrap_or(usize::MAX).min(self.page);
        let found: Vec<_> =
            self.objects.iter().filter(|(key, object)| route.selects(key, object)).map(|(_, object)| object).collect();
        let items: Vec<Value> = found.iter().skip(start).take(limit).map(|object| route.item(object)).collect();
        let next = start + items.len();
        let mut metadata = json!({ "resourceVersion": self.version.to_string() });
        if next < found.len() {
            metadata["continue"] = json!(next.to_string());
        }
        Ok(json!({ "apiVersion": route.api_version(), "kind": "List", "metadata": metadata, "items": items }))
    }

    /// The next line of a watch, if there is one by now.
    fn next_line(&self, route: &Route, position: &mut u64) -> Result<Option<Bytes>, WatchEnd> {
        if self.down {
            return Err(WatchEnd::Broken);
        }
        if !self.offers(route) {
            return Err(WatchEnd::Over);
        }
        if self.held {
            return Ok(None);
        }
        if *position < self.forgotten {
            return Err(WatchEnd::Gone);
        }
        let selected = |change: &&Change| change.version > *position && route.selects(&change.key, &change.object);
        let Some(change) = self.log.iter().find(selected) else { return Ok(None) };
        *position = change.version;
        Ok(Some(line_of(change.kind, &route.dressed(&change.object))))
    }

    fn offers(&self, route: &Route) -> bool {
        let wanted = if route.status { format!("{}/status", route.plural) } else { route.plural.clone() };
        let offers = |(group, version, plurals): &(&str, &str, Vec<&str>)| {
            *group == route.group && *version == route.version && plurals.contains(&wanted.as_str())
        };
        route.group.is_empty() || self.offered.iter().any(offers)
    }

    fn discovery(&self, route: &Route) -> Result<Option<Value>, (u16, &'static str)> {
        if !route.plural.is_empty() {
            return Ok(None);
        }
        let of_group: Vec<_> = self.offered.iter().filter(|(group, ..)| *group == route.group).collect();
        if of_group.is_empty() {
            return Err((404, "NotFound"));
        }
        let named = |version: &str| json!({ "groupVersion": format!("{}/{version}", route.group), "version": version });
        if route.version.is_empty() {
            let versions: Vec<_> = of_group.iter().map(|(_, version, _)| named(version)).collect();
            return Ok(Some(json!({ "apiVersion": "v1", "kind": "APIGroup", "name": route.group, "versions": versions })));
        }
        let resources = of_group.iter().filter(|(_, version, _)| *version == route.version).flat_map(|(.., plurals)| plurals);
        let resource =
            |plural: &&str| json!({ "name": plural, "singularName": "", "namespaced": true, "kind": "X", "verbs": [] });
        let resources: Vec<_> = resources.map(resource).collect();
        let version = format!("{}/{}", route.group, route.version);
        Ok(Some(json!({ "apiVersion": "v1", "kind": "APIResourceList", "groupVersion": version, "resources": resources })))
    }
}

impl Service<Request<kube::client::Body>> for ApiServer {
    type Response = Response<Body>;
    type Error = io::Error;
    type Future = BoxFuture<'static, Result<Response<Body>, io::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), io::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<kube::client::Body>) -> Self::Future {
        self.clone().answer(request).boxed()
    }
}

fn respond(code: u16, value: &Value) -> Response<Body> {
    Response::builder().status(code).header("content-type", "application/json").body(Body::from(value.to_string())).unwrap()
}

fn status(code: u16, reason: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": reason })
}

fn line_of(kind: &str, object: &Value) -> Bytes {
    format!("{}\n", json!({ "type": kind, "object": object })).into()
}

/// Puts the fields of `patch` into `object`.
fn merge(object: &mut Value, patch: Value) {
    match (object, patch) {
        (Value::Object(object), Value::Object(patch)) => {
            for (key, value) in patch {
                merge(object.entry(key).or_insert(Value::Null), value);
            }
        }
        (object, patch) => *object = patch,
    }
}
