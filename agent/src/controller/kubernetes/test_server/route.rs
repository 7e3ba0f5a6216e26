//! What a request's path and query ask for.

use std::collections::BTreeMap;

use http::Uri;
use serde_json::{Value, json};

use super::Key;

/// A parsed path.
#[derive(Clone, Debug, Default)]
pub(super) struct Route {
    pub(super) group: String,
    pub(super) version: String,
    pub(super) plural: String,
    namespace: Option<String>,
    name: Option<String>,
    pub(super) status: bool,
    query: BTreeMap<String, String>,
}

impl Route {
    pub(super) fn parse(uri: &Uri) -> Self {
        let mut parts = uri.path().split('/').skip(1).map(str::to_owned).collect::<Vec<_>>().into_iter();
        let mut route = Self::default();
        if parts.next().as_deref() == Some("apis") {
            route.group = parts.next().unwrap_or_default();
        }
        route.version = parts.next().unwrap_or_default();
        let mut rest: Vec<String> = parts.collect();
        // `namespaces/x/pods` is a collection in a namespace, `namespaces/x` a namespace.
        if rest.first().is_some_and(|first| first == "namespaces") && rest.len() > 2 {
            route.namespace = Some(rest[1].clone());
            rest.drain(..2);
        }
        let mut rest = rest.into_iter();
        route.plural = rest.next().unwrap_or_default();
        route.name = rest.next();
        route.status = rest.next().as_deref() == Some("status");
        for pair in uri.query().unwrap_or_default().split('&') {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            route.query.insert(key.to_owned(), unescaped(value));
        }
        route
    }

    pub(super) fn query(&self, key: &str) -> Option<&str> {
        self.query.get(key).map(String::as_str)
    }

    /// The one object that is meant, if it is one.
    pub(super) fn key(&self) -> Option<Key> {
        let name = self.name.clone()?;
        Some((self.group.clone(), self.plural.clone(), self.namespace.clone().unwrap_or_default(), name))
    }

    pub(super) fn selects(&self, (group, plural, namespace, name): &Key, object: &Value) -> bool {
        let field = |selector: &str| {
            let (path, wanted) = selector.split_once('=').unwrap();
            match path {
                "metadata.name" => name == wanted,
                path => object.pointer(&format!("/{}", path.replace('.', "/"))).and_then(Value::as_str) == Some(wanted),
            }
        };
        *group == self.group
            && *plural == self.plural
            && self.namespace.as_ref().is_none_or(|wanted| wanted == namespace)
            && self.query("fieldSelector").is_none_or(field)
    }

    pub(super) fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }

    /// An object as it is sent alone, in the version that was asked for.
    pub(super) fn dressed(&self, object: &Value) -> Value {
        let mut object = object.clone();
        object["apiVersion"] = json!(self.api_version());
        object
    }

    /// An object as it is sent in a list: those of the server's own kinds name neither kind nor version.
    pub(super) fn item(&self, object: &Value) -> Value {
        let mut object = self.dressed(object);
        if self.group != "security.istio.io" {
            let object = object.as_object_mut().unwrap();
            object.remove("apiVersion");
            object.remove("kind");
        }
        object
    }
}

/// Where an object belongs.
pub(super) fn key_of(object: &Value) -> Key {
    let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (kind, api_version) = (text("/kind"), text("/apiVersion"));
    let plural = match kind.as_str() {
        "AuthorizationPolicy" => "authorizationpolicies".to_owned(),
        kind => format!("{}s", kind.to_lowercase()),
    };
    let group = api_version.split_once('/').map_or("", |(group, _)| group).to_owned();
    (group, plural, text("/metadata/namespace"), text("/metadata/name"))
}

fn unescaped(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        match first {
            b'%' => {
                bytes.push(u8::from_str_radix(std::str::from_utf8(&tail[..2]).unwrap(), 16).unwrap());
                rest = &tail[2..];
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8(bytes).unwrap()
}
