//! What the chart is told: its defaults, the user's files, and `--set`, merged as Helm merges them, and checked.
//!
//! The chart's `values.schema.json` says the same to Helm; a test holds the two against each other.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use crate::config::parse_duration;
use crate::model::TrustDomain;

/// The chart's own values, in words and with reasons.
pub(super) const DEFAULTS: &str = include_str!("../../../deploy/helm/culvert/values.yaml");

/// Why values are refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValuesError {
    /// A file of values is no YAML mapping.
    #[error("values: {0}")]
    Yaml(String),
    /// `--set` has another form.
    #[error("--set {0}: write PATH=VALUE, such as --set controller.replicas=3; the value is read as YAML")]
    Set(String),
    /// A value cannot be.
    #[error("value `{path}`: {why}")]
    Value {
        /// Where.
        path: String,
        /// What is wrong, and what may stand there.
        why: String,
    },
}

/// Checked values.
#[derive(Clone, Debug, PartialEq)]
pub struct Values(Value);

impl Values {
    /// The defaults, changed by the texts of `files` in order, and then by each of `sets` (`path.to.value=YAML`).
    ///
    /// # Errors
    /// [`ValuesError`] for the first that is wrong.
    pub fn merge(files: &[String], sets: &[String]) -> Result<Self, ValuesError> {
        let mut values = mapping(DEFAULTS)?;
        for file in files {
            merge(&mut values, mapping(file)?);
        }
        for set in sets {
            let (path, text) = set.split_once('=').ok_or_else(|| ValuesError::Set(set.clone()))?;
            let value = serde_yaml_ng::from_str(text).map_err(|_no_yaml| ValuesError::Set(set.clone()))?;
            let names = split_path(path).ok_or_else(|| ValuesError::Set(set.clone()))?;
            let nested = names.into_iter().rev().fold(value, |value, name| Value::Object(Map::from_iter([(name, value)])));
            merge(&mut values, nested);
        }
        let checked: Result<Checked, _> = serde_path_to_error::deserialize(&values);
        match checked {
            Ok(_) => Ok(Self(values)),
            Err(error) => Err(ValuesError::Value { path: error.path().to_string(), why: error.inner().to_string() }),
        }
    }

    /// As a template sees them.
    #[must_use]
    pub(super) fn as_value(&self) -> &Value {
        &self.0
    }
}

fn mapping(text: &str) -> Result<Value, ValuesError> {
    let value: Value = serde_yaml_ng::from_str(text).map_err(|error| ValuesError::Yaml(error.to_string()))?;
    match value {
        Value::Null => Ok(Value::Object(Map::new())),
        Value::Object(_) => Ok(value),
        Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            Err(ValuesError::Yaml("a mapping is needed".to_owned()))
        }
    }
}

/// Mappings are merged; all else takes the place of what was there.
fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (name, value) in from {
                merge(into.entry(name).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

/// The names of a path; a backslash keeps a dot in a name. None: one of them is empty.
fn split_path(path: &str) -> Option<Vec<String>> {
    let mut names = vec![String::new()];
    let mut letters = path.chars();
    while let Some(letter) = letters.next() {
        let name = names.last_mut()?;
        match letter {
            '\\' => name.push(letters.next()?),
            '.' => names.push(String::new()),
            _ => name.push(letter),
        }
    }
    names.iter().all(|name| !name.is_empty()).then_some(names)
}

type List = Vec<Map<String, Value>>;
type Texts = std::collections::BTreeMap<String, String>;

macro_rules! fields {
    ($($name:ident { $($field:ident: $kind:ty),+ $(,)? })+) => {$(
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase", deny_unknown_fields)]
        #[expect(dead_code, reason = "values are read by the templates; here they are only checked")]
        struct $name { $($field: $kind),+ }
    )+};
}

fields! {
    Checked {
        image: Image, namespace: Namespace, trust_domain: Parsed<TrustDomain>, cluster_domain: Parsed<Name>,
        root_namespace: Parsed<Name>, excluded_namespaces: Several<Parsed<Name>>, cert_ttl: Time, default_deny: bool, same_node: SameNode,
        bind_address: Parsed<BindAddress>, log: Log,
        priority_quota: bool, prometheus_annotations: bool, agent: Agent, controller: Controller,
    }
    Image { repository: Parsed<ImageWord>, tag: Parsed<OptionalImageWord>, pull_policy: PullPolicy, pull_secrets: Vec<Parsed<Name>> }
    Namespace { create: bool }
    Log { filter: Parsed<Filter>, format: Format }
    Agent {
        priority_class_name: Parsed<Name>, tolerations: List, node_selector: Texts, affinity: Map<String, Value>,
        update_strategy: UpdateStrategy, drain_timeout: Time, termination_grace_period_seconds: Within<1, 86_400>,
        resources: Map<String, Value>, netns_dir: Parsed<Directory>, bpffs_dir: Parsed<Directory>, state_dir: Parsed<Directory>,
        cgroup_dir: Parsed<Directory>,
        mount_bpffs: bool, se_linux_options: Map<String, Value>, host_aliases: List, pod_annotations: Texts, extra_args: Vec<Parsed<Flag>>,
    }
    Controller {
        replicas: Within<1, 100>, priority_class_name: Parsed<Name>, tolerations: List, node_selector: Texts,
        resources: Map<String, Value>, network_policy: NetworkPolicy, pod_disruption_budget: Enabled, pod_annotations: Texts,
        extra_args: Vec<Parsed<Flag>>,
    }
    NetworkPolicy { enabled: bool, metrics_from: List, api_server_ports: Several<Within<1, 65_535>> }
    Enabled { enabled: bool }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(dead_code, reason = "values are read by the templates; here they are only checked")]
struct UpdateStrategy {
    r#type: Update,
    rolling_update: Option<Map<String, Value>>,
}

#[derive(Deserialize)]
enum PullPolicy {
    Always,
    IfNotPresent,
    Never,
}

#[derive(Deserialize)]
enum Update {
    RollingUpdate,
    OnDelete,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum SameNode {
    Kernel,
    Tunnel,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Format {
    Json,
    Text,
}

/// A text that is checked by reading it.
struct Parsed<T>(std::marker::PhantomData<T>);

trait Check {
    /// What may stand there.
    const FORM: &'static str;

    fn accepts(text: &str) -> bool;
}

impl<'de, T: Check> Deserialize<'de> for Parsed<T> {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        let text = String::deserialize(source)?;
        if T::accepts(&text) {
            Ok(Self(std::marker::PhantomData))
        } else {
            Err(serde::de::Error::custom(format!("`{text}` is not {}", T::FORM)))
        }
    }
}

macro_rules! texts {
    ($($name:ty, $form:literal, $accepts:expr;)+) => {$(
        impl Check for $name {
            const FORM: &'static str = $form;

            fn accepts(text: &str) -> bool {
                let accepts: fn(&str) -> bool = $accepts;
                accepts(text)
            }
        }
    )+};
}

struct Name;
struct BindAddress;
struct ImageWord;
struct OptionalImageWord;
struct Filter;
struct Directory;
struct Flag;

texts! {
    TrustDomain, "a trust domain: lower-case letters, digits, '.', '-' and '_'", |text| text.parse::<TrustDomain>().is_ok();
    Name, "a name: lower-case letters, digits, '-' and '.'", is_name;
    BindAddress, "an IPv4 address, or an IPv6 address in brackets", |text| {
        let v6 = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
        v6.map_or_else(|| text.parse::<Ipv4Addr>().is_ok(), |text| text.parse::<Ipv6Addr>().is_ok())
    };
    ImageWord, "an image's name", |text| text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit()) && is_of(text, b"._:/-");
    OptionalImageWord, "an image's tag", |text| text.len() <= 128 && is_of(text, b"._-");
    Filter, "a level or directives", |text| !text.is_empty();
    Directory, "an absolute path without ':', ',' and blanks", |text| text.len() > 1 && text.starts_with('/') && !text.contains([':', ',', ' ']);
    Flag, "an argument that begins with --", |text| text.starts_with("--");
}

fn is_of(text: &str, others: &[u8]) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || others.contains(&byte))
}

/// Kubernetes' own rule for names: RFC 1123, with dots.
fn is_name(text: &str) -> bool {
    let edge = |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    let bytes = text.as_bytes();
    let middle = bytes.iter().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(byte));
    bytes.len() <= 253 && edge(bytes.first()) && edge(bytes.last()) && middle
}

struct Time;

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        parse_duration(&String::deserialize(source)?).map(|_time| Self).map_err(serde::de::Error::custom)
    }
}

struct Within<const LEAST: u32, const MOST: u32>;

impl<'de, const LEAST: u32, const MOST: u32> Deserialize<'de> for Within<LEAST, MOST> {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        let number = u32::deserialize(source)?;
        let fits = (LEAST..=MOST).contains(&number);
        if fits { Ok(Self) } else { Err(serde::de::Error::custom(format!("{number} is not from {LEAST} to {MOST}"))) }
    }
}

/// A list that is not empty.
struct Several<T>(std::marker::PhantomData<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Several<T> {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        let items = Vec::<T>::deserialize(source)?;
        if items.is_empty() {
            Err(serde::de::Error::custom("at least one is needed"))
        } else {
            Ok(Self(std::marker::PhantomData))
        }
    }
}

#[cfg(test)]
mod tests;
