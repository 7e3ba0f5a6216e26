//! A cluster's API, asked for objects of any kind that it serves.
//!
//! Enters: a kubeconfig, or a client. Leaves: objects as JSON. What the API offers is asked once, at the start: kinds, their versions
//! and their paths; nothing is concluded from a release's number.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::pin::Pin;
use std::time::SystemTime;

use futures_util::{Stream, StreamExt as _};
use http::{Method, Request};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::APIResource;
use kube::client::{Body, Client};
use kube::config::{Config, KubeConfigOptions, Kubeconfig};
use kube::core::WatchEvent;
use serde_json::Value;
use time::PrimitiveDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

/// Who changed a field, as the API notes it.
pub const MANAGER: &str = "culvert";

/// Groups whose kinds an installation has, makes or reads. Their versions are those that the API serves.
const GROUPS: [&str; 11] = [
    "admissionregistration.k8s.io",
    "apiextensions.k8s.io",
    "apps",
    "authorization.k8s.io",
    "certificates.k8s.io",
    "coordination.k8s.io",
    "discovery.k8s.io",
    "networking.k8s.io",
    "policy",
    "rbac.authorization.k8s.io",
    "security.istio.io",
];

/// `Sun, 06 Nov 1994 08:49:37 GMT`.
const HTTP_DATE: &[BorrowedFormatItem<'_>] =
    format_description!("[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT");

/// Why a cluster cannot be asked, or does not do what it is asked for.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// There is no way to the cluster.
    #[error("no cluster to talk to: {0}; name a file with --kubeconfig, or set KUBECONFIG")]
    Config(String),
    /// The API does not serve a kind.
    #[error("the cluster's API has no kind {kind} of {api_version}")]
    NoKind {
        /// The version that was asked for.
        api_version: String,
        /// The kind.
        kind: String,
    },
    /// A request failed.
    #[error("{what}: {why}")]
    Request {
        /// What was asked for.
        what: String,
        /// The API's answer, or what kept it from answering.
        why: String,
        /// The answer's HTTP status; none without an answer.
        status: Option<u16>,
    },
    /// Something did not come about in time.
    #[error("{what} after {seconds} s: {why}")]
    Late {
        /// What is not as it shall be.
        what: String,
        /// How long it was waited for.
        seconds: u64,
        /// What the cluster says about it.
        why: String,
    },
}

impl ClusterError {
    /// Whether the API said that there is no such object.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Request { status: Some(404), .. })
    }

    /// Whether the API said that the caller may not.
    #[must_use]
    pub fn is_forbidden(&self) -> bool {
        matches!(self, Self::Request { status: Some(401 | 403), .. })
    }
}

/// Which object: its version, kind, namespace (none for those of the whole cluster) and name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectRef {
    /// `group/version`, or `v1`.
    pub api_version: String,
    /// The kind.
    pub kind: String,
    /// The namespace.
    pub namespace: Option<String>,
    /// The name.
    pub name: String,
}

impl ObjectRef {
    /// The reference of an object of a namespace.
    #[must_use]
    pub fn namespaced(api_version: &str, kind: &str, namespace: &str, name: &str) -> Self {
        let namespace = Some(namespace.to_owned());
        Self { api_version: api_version.to_owned(), kind: kind.to_owned(), namespace, name: name.to_owned() }
    }

    /// What `object` is. Empty texts where it does not say.
    #[must_use]
    pub fn of(object: &Value) -> Self {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Self {
            api_version: text(&object["apiVersion"]),
            kind: text(&object["kind"]),
            namespace: object["metadata"]["namespace"].as_str().map(str::to_owned),
            name: text(&object["metadata"]["name"]),
        }
    }
}

/// Which objects of a kind. The default is all of them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Which<'a> {
    /// Those of this namespace; none: of all.
    pub namespace: Option<&'a str>,
    /// Those that this label selector takes; empty: all.
    pub labels: &'a str,
    /// Those that this field selector takes; empty: all.
    pub fields: &'a str,
}

impl<'a> Which<'a> {
    /// Those of a namespace that a label selector takes.
    #[must_use]
    pub fn labelled(namespace: &'a str, labels: &'a str) -> Self {
        Self { namespace: Some(namespace), labels, fields: "" }
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{} {namespace}/{}", self.kind, self.name),
            None => write!(f, "{} {}", self.kind, self.name),
        }
    }
}

/// A cluster, and what its API offers.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
    versions: Vec<String>,
    kinds: BTreeMap<(String, String), Resource>,
}

#[derive(Clone, Debug)]
struct Resource {
    plural: String,
    namespaced: bool,
}

/// News of objects of a kind: each object as it is now, and whether it is still there.
pub type Events = Pin<Box<dyn Stream<Item = Result<(Value, bool), ClusterError>> + Send>>;

impl Cluster {
    /// Finds the cluster by a kubeconfig file, by `KUBECONFIG`, or as the pod that this runs in, and asks what it offers.
    ///
    /// # Errors
    /// [`ClusterError::Config`], and those of [`Cluster::ask`].
    pub async fn connect(kubeconfig: Option<&Path>, context: Option<&str>) -> Result<Self, ClusterError> {
        let failed = |error: &dyn std::error::Error| ClusterError::Config(chain(error));
        let options = KubeConfigOptions { context: context.map(str::to_owned), ..KubeConfigOptions::default() };
        let config = match kubeconfig {
            Some(file) => {
                let read = Kubeconfig::read_from(file).map_err(|error| failed(&error))?;
                Config::from_custom_kubeconfig(read, &options).await.map_err(|error| failed(&error))?
            }
            None if context.is_some() => Config::from_kubeconfig(&options).await.map_err(|error| failed(&error))?,
            None => Config::infer().await.map_err(|error| failed(&error))?,
        };
        Self::ask(Client::try_from(config).map_err(|error| failed(&error))?).await
    }

    /// Asks what the API behind `client` offers.
    ///
    /// # Errors
    /// [`ClusterError::Request`] when it does not answer.
    pub async fn ask(client: Client) -> Result<Self, ClusterError> {
        let failed = |error| request_error("asking what the API offers".to_owned(), error);
        let mut cluster = Self { client, versions: Vec::new(), kinds: BTreeMap::new() };
        let core = cluster.client.list_core_api_resources("v1").await.map_err(failed)?;
        cluster.learn("v1", core.resources);
        for group in cluster.client.list_api_groups().await.map_err(failed)?.groups {
            let preferred = group.preferred_version.map(|version| version.group_version);
            let mut versions: Vec<String> = group.versions.into_iter().map(|version| version.group_version).collect();
            versions.sort_by_key(|version| Some(version) != preferred.as_ref());
            for version in versions {
                if GROUPS.contains(&group.name.as_str()) {
                    let listed = cluster.client.list_api_group_resources(&version).await.map_err(failed)?;
                    cluster.learn(&version, listed.resources);
                } else {
                    cluster.versions.push(version);
                }
            }
        }
        Ok(cluster)
    }

    fn learn(&mut self, version: &str, resources: Vec<APIResource>) {
        self.versions.push(version.to_owned());
        for resource in resources.into_iter().filter(|resource| !resource.name.contains('/')) {
            self.versions.push(format!("{version}/{}", resource.kind));
            let known = Resource { plural: resource.name, namespaced: resource.namespaced };
            self.kinds.insert((version.to_owned(), resource.kind), known);
        }
    }

    /// `group/version` and `group/version/Kind` of what the API offers; a group's preferred version comes first.
    #[must_use]
    pub fn api_versions(&self) -> &[String] {
        &self.versions
    }

    /// The first of the versions by which the API serves a kind of a group (empty: the core).
    #[must_use]
    pub fn version_of(&self, group: &str, kind: &str) -> Option<&str> {
        let of_group = |version: &&String| version.split_once('/').map_or("", |(group, _)| group) == group;
        let versions = self.versions.iter().filter(of_group);
        let found = versions.filter(|version| self.kinds.contains_key(&((*version).clone(), kind.to_owned())));
        found.map(String::as_str).next()
    }

    /// Reads an object; none if there is no such.
    ///
    /// # Errors
    /// [`ClusterError`], but for an object that is not there.
    pub async fn get(&self, object: &ObjectRef) -> Result<Option<Value>, ClusterError> {
        let found = self.call(Method::GET, self.path(object)?, "", None, format!("reading {object}")).await;
        match found {
            Ok(found) => Ok(Some(found)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Lists objects of a kind.
    ///
    /// # Errors
    /// [`ClusterError`].
    pub async fn list(&self, api_version: &str, kind: &str, which: Which<'_>) -> Result<Vec<Value>, ClusterError> {
        const PAGE: &str = "500";
        let path = self.collection(api_version, kind, which.namespace)?;
        let mut items = Vec::new();
        let mut token = String::new();
        loop {
            let selectors = [("labelSelector", which.labels), ("fieldSelector", which.fields)];
            let query = query(&[selectors.as_slice(), &[("limit", PAGE), ("continue", &token)]].concat());
            let mut list = self.call(Method::GET, path.clone(), &query, None, format!("listing {kind}")).await?;
            if let Value::Array(page) = list["items"].take() {
                items.extend(page);
            }
            match list["metadata"]["continue"].as_str() {
                Some(next) if !next.is_empty() => next.clone_into(&mut token),
                _ => break,
            }
        }
        for item in &mut items {
            item["apiVersion"] = api_version.into();
            item["kind"] = kind.into();
        }
        Ok(items)
    }

    /// Applies an object, taking over the fields that it names, and gives what is there then.
    ///
    /// # Errors
    /// [`ClusterError`].
    pub async fn apply(&self, object: &Value) -> Result<Value, ClusterError> {
        let reference = ObjectRef::of(object);
        let query = query(&[("fieldManager", MANAGER), ("force", "true")]);
        let body = Some(("application/apply-patch+yaml", object));
        self.call(Method::PATCH, self.path(&reference)?, &query, body, format!("applying {reference}")).await
    }

    /// Makes an object that must not be there yet.
    ///
    /// # Errors
    /// [`ClusterError`].
    pub async fn create(&self, object: &Value) -> Result<Value, ClusterError> {
        let reference = ObjectRef::of(object);
        let path = self.collection(&reference.api_version, &reference.kind, reference.namespace.as_deref())?;
        let body = Some(("application/json", object));
        self.call(Method::POST, path, &query(&[("fieldManager", MANAGER)]), body, format!("making {reference}")).await
    }

    /// Removes an object; what it owns follows. False: it was not there.
    ///
    /// # Errors
    /// [`ClusterError`], but for an object that is not there.
    pub async fn delete(&self, object: &ObjectRef) -> Result<bool, ClusterError> {
        let query = query(&[("propagationPolicy", "Background")]);
        match self.call(Method::DELETE, self.path(object)?, &query, None, format!("removing {object}")).await {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// A text that the API gives at a path, such as one of a pod's that it stands in for.
    ///
    /// # Errors
    /// [`ClusterError::Request`].
    pub async fn text(&self, path: &str) -> Result<String, ClusterError> {
        let request = request(Method::GET, path, None)?;
        self.client.request_text(request).await.map_err(|error| request_error(format!("reading {path}"), error))
    }

    /// The API server's clock, by the date of its answer: RFC 9110, section 6.6.1. None: it does not tell.
    ///
    /// # Errors
    /// [`ClusterError::Request`].
    pub async fn clock(&self) -> Result<Option<SystemTime>, ClusterError> {
        let request = request(Method::GET, "/version", None)?.map(Body::from);
        let answer = self.client.send(request).await.map_err(|error| request_error("asking for the time".to_owned(), error))?;
        let date = answer.headers().get(http::header::DATE).and_then(|date| date.to_str().ok());
        Ok(date.and_then(|date| PrimitiveDateTime::parse(date, HTTP_DATE).ok()).map(|date| date.assume_utc().into()))
    }

    /// Follows objects of a kind: what is there comes first, then each change. Ends when the API ends it.
    ///
    /// # Errors
    /// [`ClusterError`].
    pub async fn watch(&self, api_version: &str, kind: &str, which: Which<'_>) -> Result<Events, ClusterError> {
        let path = self.collection(api_version, kind, which.namespace)?;
        let query = query(&[("watch", "true"), ("labelSelector", which.labels), ("fieldSelector", which.fields)]);
        let what = format!("following {kind}");
        let failed = move |error| request_error(what.clone(), error);
        let request = request(Method::GET, &format!("{path}?{query}"), None)?;
        let events = self.client.request_events::<Value>(request).await.map_err(&failed)?;
        let events = events.map(move |event| match event.map_err(&failed)? {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => Ok((object, true)),
            WatchEvent::Deleted(object) => Ok((object, false)),
            WatchEvent::Bookmark(_) => Ok((Value::Null, true)),
            WatchEvent::Error(status) => Err(failed(kube::Error::Api(status))),
        });
        Ok(Box::pin(events))
    }

    async fn call(
        &self,
        method: Method,
        path: String,
        query: &str,
        body: Option<(&'static str, &Value)>,
        what: String,
    ) -> Result<Value, ClusterError> {
        let request = request(method, &format!("{path}?{query}"), body)?;
        self.client.request(request).await.map_err(|error| request_error(what, error))
    }

    fn path(&self, object: &ObjectRef) -> Result<String, ClusterError> {
        let collection = self.collection(&object.api_version, &object.kind, object.namespace.as_deref())?;
        Ok(format!("{collection}/{}", object.name))
    }

    fn collection(&self, api_version: &str, kind: &str, namespace: Option<&str>) -> Result<String, ClusterError> {
        let no_kind = || ClusterError::NoKind { api_version: api_version.to_owned(), kind: kind.to_owned() };
        let resource = self.kinds.get(&(api_version.to_owned(), kind.to_owned())).ok_or_else(no_kind)?;
        let root = if api_version.contains('/') { "apis" } else { "api" };
        let inside = namespace.filter(|_| resource.namespaced).map(|name| format!("/namespaces/{name}")).unwrap_or_default();
        Ok(format!("/{root}/{api_version}{inside}/{}", resource.plural))
    }
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster").field("kinds", &self.kinds.len()).finish_non_exhaustive()
    }
}

fn request(method: Method, path: &str, body: Option<(&'static str, &Value)>) -> Result<Request<Vec<u8>>, ClusterError> {
    let mut builder = Request::builder().method(method).uri(path).header(http::header::ACCEPT, "application/json");
    let mut bytes = Vec::new();
    if let Some((media_type, value)) = body {
        builder = builder.header(http::header::CONTENT_TYPE, media_type);
        bytes = value.to_string().into_bytes();
    }
    builder.body(bytes).map_err(|error| ClusterError::Request {
        what: format!("asking for {path}"),
        why: error.to_string(),
        status: None,
    })
}

/// A query of those pairs that have a value. Only what selectors and tokens are made of needs no more than this.
fn query(pairs: &[(&str, &str)]) -> String {
    let escape = |text: &str| text.bytes().map(escaped).collect::<String>();
    let pairs = pairs.iter().filter(|(_, value)| !value.is_empty());
    pairs.map(|(name, value)| format!("{name}={}", escape(value))).collect::<Vec<_>>().join("&")
}

/// RFC 3986, section 2.1, of all but unreserved characters.
fn escaped(byte: u8) -> String {
    if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }
}

fn request_error(what: String, error: kube::Error) -> ClusterError {
    let kube::Error::Api(status) = &error else {
        return ClusterError::Request { what, why: chain(&error), status: None };
    };
    let why = if status.message.is_empty() { status.reason.clone() } else { status.message.clone() };
    ClusterError::Request { what, why, status: Some(status.code) }
}

/// An error with its causes, each once.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}
