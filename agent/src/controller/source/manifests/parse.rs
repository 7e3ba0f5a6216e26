//! A manifest file's bytes into objects.
//!
//! Enters: the content of one file. Leaves: each document's object, or what is wrong with it. YAML takes the road that
//! Kubernetes' own tools take: through JSON, keys as text. Objects of other kinds are passed over.

mod yaml;

use std::fmt;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::Value;
use tracing::debug;

use crate::controller::source::object::{FieldError, Kind, Object};
use crate::controller::source::stand_in;
use crate::policy::compile::MeshContext;

/// The largest manifest file read, in bytes.
pub(super) const MAX_FILE: u64 = 32 * 1024 * 1024;

/// A document or list item of a file.
#[derive(Debug)]
pub(super) struct Item {
    /// Where in the file it is.
    pub(super) place: Place,
    /// The object, with a digest of its content; or why it cannot be used.
    pub(super) object: Result<(Object, [u8; 32]), ItemError>,
    /// What stands in for a policy that cannot be used.
    pub(super) stand_in: Option<(Object, [u8; 32])>,
}

/// Where in a file an object is, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) document: usize,
    pub(super) item: Option<usize>,
}

/// Why a whole file cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum FileError {
    #[error("is not UTF-8 text: byte {0} is not part of a character")]
    Encoding(usize),
    #[error("document {document} is not YAML that an object can be written in: {source}")]
    Yaml { document: usize, source: serde_yaml_ng::Error },
    #[error("is not JSON: {0}")]
    Json(#[from] serde_json::Error),
}

/// Why an object cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{subject}: {error}")]
pub(super) struct ItemError {
    /// Kind and name, as far as they are known.
    subject: String,
    error: FieldError,
}

/// Reads all objects of a file. Documents that hold nothing, and kinds that are no part of the mesh, leave no item.
pub(super) fn parse(path: &Path, content: &[u8], mesh: &MeshContext) -> Result<Vec<Item>, FileError> {
    let text = std::str::from_utf8(content).map_err(|error| FileError::Encoding(error.valid_up_to()))?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut items = Vec::new();
    if path.extension().is_some_and(|extension| extension == "json") {
        if !text.trim().is_empty() {
            document(1, serde_json::from_str(text)?, mesh, &mut items);
        }
        return Ok(items);
    }
    for (index, deserializer) in serde_yaml_ng::Deserializer::from_str(text).enumerate() {
        let number = index + 1;
        let value = yaml::read(deserializer).map_err(|source| FileError::Yaml { document: number, source })?;
        document(number, value, mesh, &mut items);
    }
    Ok(items)
}

fn document(document: usize, value: Value, mesh: &MeshContext, items: &mut Vec<Item>) {
    let mut push = |place: Place, value: Value| {
        let policy = policy_kind(&value).map(|kind| (kind, value.clone()));
        let Some(object) = object_of(value, mesh).transpose() else { return };
        let stand_in = policy.filter(|_| object.is_err()).and_then(|(kind, policy)| {
            let stand_in = stand_in::of(kind, &policy, mesh)?;
            Some((stand_in, digest_of(&policy)))
        });
        items.push(Item { place, object, stand_in });
    };
    match value {
        Value::Null => {}
        Value::Object(mut list) if list.get("kind").and_then(Value::as_str) == Some("List") => {
            let Some(Value::Array(members)) = list.remove("items") else { return };
            for (index, value) in members.into_iter().enumerate() {
                push(Place { document, item: Some(index + 1) }, value);
            }
        }
        value @ (Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) | Value::Object(_)) => {
            push(Place { document, item: None }, value);
        }
    }
}

/// The object that a document holds; none when it is of a kind that is no part of the mesh.
fn object_of(value: Value, mesh: &MeshContext) -> Result<Option<(Object, [u8; 32])>, ItemError> {
    let unknown = |path: &str, problem: String| ItemError {
        subject: subject(&value),
        error: FieldError { path: path.to_owned(), problem },
    };
    if !value.is_object() {
        return Err(unknown("document", format!("is {}, not a Kubernetes object", shape(&value))));
    }
    let Some(kind) = value.get("kind").and_then(Value::as_str) else {
        return Err(unknown("kind", "is missing: every object names its kind, such as `kind: Pod`".to_owned()));
    };
    let Some(api_version) = value.get("apiVersion").and_then(Value::as_str) else {
        return Err(unknown("apiVersion", "is missing: every object names it, such as `apiVersion: v1`".to_owned()));
    };
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    let known = Kind::ALL.into_iter().find(|known| known.as_str() == kind && known.group_versions().0 == group);
    let Some(known) = known else {
        debug!(kind, api_version, "not a kind that the mesh is made of: skipped");
        return Ok(None);
    };
    let versions = known.group_versions().1;
    if !versions.contains(&version) {
        let served = versions.iter().map(|version| format!("{group}/{version}")).collect::<Vec<_>>().join(" or ");
        return Err(unknown(
            "apiVersion",
            format!("`{api_version}` is not served for {kind}: use {}", served.trim_start_matches('/')),
        ));
    }
    let policy = matches!(known, Kind::PeerAuthentication | Kind::AuthorizationPolicy);
    let fields = ["apiVersion", "kind", "metadata", "spec", "status"];
    let stray = value.as_object().and_then(|object| object.keys().find(|key| policy && !fields.contains(&key.as_str())));
    if let Some(stray) = stray {
        return Err(unknown(stray, format!("is not a field of {kind}: it has {}", fields.join(", "))));
    }
    let digest = digest_of(&value);
    let subject = subject(&value);
    typed(known, value)
        .and_then(|object| object.check(mesh).map(|()| Some((object, digest))))
        .map_err(|error| ItemError { subject, error })
}

/// The kind of a policy; none for what is none.
fn policy_kind(value: &Value) -> Option<Kind> {
    let text = |field| value.get(field).and_then(Value::as_str).unwrap_or_default();
    let policies = [Kind::PeerAuthentication, Kind::AuthorizationPolicy];
    policies
        .into_iter()
        .find(|kind| text("kind") == kind.as_str() && text("apiVersion").split('/').next() == Some(kind.group_versions().0))
}

fn typed(kind: Kind, value: Value) -> Result<Object, FieldError> {
    Ok(match kind {
        Kind::Node => Object::Node(deserialize(value)?),
        Kind::Namespace => Object::Namespace(deserialize(value)?),
        Kind::Pod => Object::Pod(deserialize(value)?),
        Kind::ServiceAccount => Object::ServiceAccount(deserialize(value)?),
        Kind::Service => Object::Service(deserialize(value)?),
        Kind::EndpointSlice => Object::EndpointSlice(deserialize(value)?),
        Kind::PeerAuthentication => Object::PeerAuthentication(deserialize(value)?),
        Kind::AuthorizationPolicy => Object::AuthorizationPolicy(deserialize(value)?),
    })
}

fn deserialize<T: DeserializeOwned>(value: Value) -> Result<Box<T>, FieldError> {
    serde_path_to_error::deserialize(value).map(Box::new).map_err(|error| {
        let path = error.path().to_string();
        let path = if path == "." { "object".to_owned() } else { path };
        FieldError { path, problem: error.into_inner().to_string() }
    })
}

fn digest_of(value: &Value) -> [u8; 32] {
    let mut digest = [0; 32];
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, value.to_string().as_bytes());
    digest.copy_from_slice(hash.as_ref());
    digest
}

/// Kind and name of an object that may lack either.
fn subject(value: &Value) -> String {
    let text = |pointer| value.pointer(pointer).and_then(Value::as_str);
    let kind = text("/kind").unwrap_or("object");
    match (text("/metadata/namespace"), text("/metadata/name")) {
        (Some(namespace), Some(name)) => format!("{kind} {namespace}/{name}"),
        (None, Some(name)) => format!("{kind} {name}"),
        (_, None) => format!("{kind} without a name"),
    }
}

fn shape(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "a mapping",
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.item {
            Some(item) => write!(f, "document {}, item {item}", self.document),
            None => write!(f, "document {}", self.document),
        }
    }
}
