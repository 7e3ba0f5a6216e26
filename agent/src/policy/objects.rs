//! `PeerAuthentication` and `AuthorizationPolicy` of `security.istio.io/v1` and `v1beta1`, as users write them.
//!
//! Enter: any serde format (YAML, JSON, a parsed value). Leave: typed objects, or an error that names the field. A field that is
//! not known is an error: a policy must not be weakened by a misspelling. Nothing is interpreted here.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, Error, MapAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer};

/// The `apiVersion`s that are read.
pub const API_VERSIONS: [&str; 2] = ["security.istio.io/v1", "security.istio.io/v1beta1"];

/// What an object of a kind specifies.
pub trait Spec: DeserializeOwned + Default {
    /// The object's `kind`.
    const KIND: &'static str;
}

/// A Kubernetes object with a specification.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", bound = "S: Spec")]
pub struct Object<S: Spec> {
    /// The API group and version; the items of a list have none.
    pub api_version: Option<String>,
    /// The kind; the items of a list have none.
    pub kind: Option<String>,
    /// Name, namespace, labels and annotations.
    pub metadata: ObjectMeta,
    /// What the object asks for. Left out, it means the same as an empty one.
    pub spec: Option<S>,
}

/// Which modes workloads accept.
pub type PeerAuthenticationPolicy = Object<PeerAuthenticationSpec>;

/// Who may connect to workloads.
pub type AuthorizationPolicy = Object<AuthorizationPolicySpec>;

/// Why an object could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// The object is of another API group or version.
    #[error("apiVersion `{0}` is not one of security.istio.io/v1 and security.istio.io/v1beta1")]
    ApiVersion(String),
    /// The object is of another kind.
    #[error("kind `{found}` is not `{expected}`")]
    Kind {
        /// The kind that it has.
        found: String,
        /// The kind that was to be read.
        expected: &'static str,
    },
    /// The object has no name.
    #[error("metadata.name is missing: every policy needs a name")]
    Name,
    /// A field is not known or has a value that it cannot have.
    #[error("{path}: {message}")]
    Field {
        /// Where in the object.
        path: String,
        /// What is wrong, and what may stand there.
        message: String,
    },
}

/// Reads an object.
///
/// # Errors
/// [`ParseError`] names the first field that is wrong.
pub fn parse<'de, S: Spec, D: Deserializer<'de>>(source: D) -> Result<Object<S>, ParseError> {
    let object: Object<S> = serde_path_to_error::deserialize(source).map_err(|error| {
        let (path, message) = (error.path().to_string(), error.inner().to_string());
        // The YAML reader begins its messages with the path too, as far as it knows it.
        let bare = message.split_once(": ").filter(|(prefix, _)| path.starts_with(prefix)).map(|(_, rest)| rest.to_owned());
        ParseError::Field { path, message: bare.unwrap_or(message) }
    })?;
    if let Some(version) = object.api_version.as_deref().filter(|version| !API_VERSIONS.contains(version)) {
        return Err(ParseError::ApiVersion(version.to_owned()));
    }
    if let Some(kind) = object.kind.as_deref().filter(|kind| *kind != S::KIND) {
        return Err(ParseError::Kind { found: kind.to_owned(), expected: S::KIND });
    }
    if object.name().is_empty() {
        return Err(ParseError::Name);
    }
    Ok(object)
}

impl<S: Spec> Object<S> {
    /// The object's name; empty if it has none.
    #[must_use]
    pub fn name(&self) -> &str {
        self.metadata.name.as_deref().unwrap_or_default()
    }

    /// The object's namespace; `default` if it names none, as Kubernetes would put it there.
    #[must_use]
    pub fn namespace(&self) -> &str {
        self.metadata.namespace.as_deref().filter(|namespace| !namespace.is_empty()).unwrap_or("default")
    }

    /// `namespace/name`.
    #[must_use]
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace(), self.name())
    }
}

/// What a `PeerAuthentication` asks for.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", deny_unknown_fields)]
pub struct PeerAuthenticationSpec {
    /// Which workloads; all of the namespace if left out.
    pub selector: Option<Selector>,
    /// The mode of all ports.
    pub mtls: Option<MutualTls>,
    /// Modes by port.
    #[serde(default, deserialize_with = "null_as_default")]
    pub port_level_mtls: BTreeMap<Port, MutualTls>,
    /// Never written: it stands in for an object of which it cannot be told what it selects, and no older one overrules it.
    #[serde(skip)]
    pub stands_in: bool,
}

impl Spec for PeerAuthenticationSpec {
    const KIND: &'static str = "PeerAuthentication";
}

/// A mode, wrapped as users write it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct MutualTls {
    /// The mode.
    #[serde(default, deserialize_with = "null_as_default")]
    pub mode: MutualTlsMode,
}

/// What a port accepts, or that a wider scope decides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MutualTlsMode {
    /// As the next wider scope says.
    #[default]
    Unset,
    /// Plaintext only.
    Disable,
    /// Plaintext and mutual TLS.
    Permissive,
    /// Mutual TLS only.
    Strict,
}

impl<'de> Deserialize<'de> for MutualTlsMode {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        let text = Text::deserialize(source)?.0;
        Ok(match text.as_str() {
            "UNSET" => Self::Unset,
            "DISABLE" => Self::Disable,
            "PERMISSIVE" => Self::Permissive,
            "STRICT" => Self::Strict,
            _ => return Err(D::Error::custom(format!("mode `{text}` is not one of UNSET, PERMISSIVE, STRICT, DISABLE"))),
        })
    }
}

/// A port, 1 to 65535.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Port(pub u16);

impl<'de> Deserialize<'de> for Port {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        struct Key;
        impl Visitor<'_> for Key {
            type Value = Port;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a port from 1 to 65535")
            }

            fn visit_u64<E: Error>(self, number: u64) -> Result<Port, E> {
                let port = u16::try_from(number).ok().filter(|port| *port != 0);
                port.map(Port).ok_or_else(|| E::invalid_value(Unexpected::Unsigned(number), &self))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Port, E> {
                super::field::port(text).map(Port).ok_or_else(|| E::invalid_value(Unexpected::Str(text), &self))
            }
        }
        source.deserialize_any(Key)
    }
}

/// Which workloads a policy is for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", deny_unknown_fields)]
pub struct Selector {
    /// Labels that a workload must all have.
    #[serde(default, deserialize_with = "labels")]
    pub match_labels: BTreeMap<String, String>,
}

/// What an `AuthorizationPolicy` asks for.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", deny_unknown_fields)]
pub struct AuthorizationPolicySpec {
    /// Which workloads; all of the namespace if left out.
    pub selector: Option<Selector>,
    /// The gateway or service whose waypoint enforces the policy.
    pub target_ref: Option<TargetRef>,
    /// The gateways or services whose waypoints enforce the policy.
    #[serde(default, deserialize_with = "null_as_default")]
    pub target_refs: Vec<TargetRef>,
    /// What a match means.
    #[serde(default, deserialize_with = "null_as_default")]
    pub action: PolicyAction,
    /// The external authorizer of a CUSTOM policy.
    pub provider: Option<Provider>,
    /// Any of these matches.
    #[serde(default, deserialize_with = "null_as_default")]
    pub rules: Vec<Rule>,
}

impl Spec for AuthorizationPolicySpec {
    const KIND: &'static str = "AuthorizationPolicy";
}

/// What a match of an `AuthorizationPolicy` means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PolicyAction {
    /// Lets the connection through.
    #[default]
    Allow,
    /// Refuses it.
    Deny,
    /// Logs it.
    Audit,
    /// Asks an external authorizer.
    Custom,
}

impl<'de> Deserialize<'de> for PolicyAction {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        let text = Text::deserialize(source)?.0;
        Ok(match text.as_str() {
            "ALLOW" => Self::Allow,
            "DENY" => Self::Deny,
            "AUDIT" => Self::Audit,
            "CUSTOM" => Self::Custom,
            _ => return Err(D::Error::custom(format!("action `{text}` is not one of ALLOW, DENY, AUDIT, CUSTOM"))),
        })
    }
}

/// An external authorizer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct Provider {
    /// Its name in the mesh's configuration.
    #[serde(default)]
    pub name: String,
}

/// What a policy is attached to instead of workloads.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(remote = "Self", default, deny_unknown_fields)]
pub struct TargetRef {
    /// The target's API group.
    pub group: Option<String>,
    /// The target's kind.
    pub kind: String,
    /// The target's name.
    pub name: String,
    /// The target's namespace.
    pub namespace: Option<String>,
}

/// One rule: `from`, `to` and all of `when`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct Rule {
    /// Any of these sources; any source at all if left out.
    pub from: Option<Vec<From>>,
    /// Any of these operations; any operation at all if left out.
    pub to: Option<Vec<To>>,
    /// All of these conditions.
    #[serde(default, deserialize_with = "null_as_default")]
    pub when: Vec<Condition>,
}

/// A source, wrapped as users write it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct From {
    /// The source.
    #[serde(default, deserialize_with = "null_as_default")]
    pub source: Source,
}

/// An operation, wrapped as users write it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct To {
    /// The operation.
    #[serde(default, deserialize_with = "null_as_default")]
    pub operation: Operation,
}

macro_rules! lists {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
        #[serde(remote = "Self", rename_all = "camelCase", deny_unknown_fields)]
        pub struct $name {
            $($(#[$field_doc])* #[serde(default, deserialize_with = "texts")] pub $field: Vec<String>,)+
        }
    };
}

lists! {
    /// Who connects. Fields are AND-ed, the values of one OR-ed.
    Source {
        /// Identities, `<trust domain>/ns/<namespace>/sa/<service account>`.
        principals,
        /// Identities that it is not.
        not_principals,
        /// Identities of requests, from tokens (HTTP).
        request_principals,
        /// Identities of requests that it is not (HTTP).
        not_request_principals,
        /// Namespaces.
        namespaces,
        /// Namespaces that it is not in.
        not_namespaces,
        /// Service accounts, `name` or `namespace/name`.
        service_accounts,
        /// Service accounts that it is not.
        not_service_accounts,
        /// Trust domains.
        trust_domains,
        /// Trust domains that it is not of.
        not_trust_domains,
        /// Addresses and ranges.
        ip_blocks,
        /// Addresses and ranges that it is not in.
        not_ip_blocks,
        /// Addresses of the original client (HTTP).
        remote_ip_blocks,
        /// Addresses that the original client is not in (HTTP).
        not_remote_ip_blocks,
    }
}

lists! {
    /// What is connected to. Fields are AND-ed, the values of one OR-ed.
    Operation {
        /// Host names (HTTP).
        hosts,
        /// Host names that it is not (HTTP).
        not_hosts,
        /// Ports.
        ports,
        /// Ports that it is not.
        not_ports,
        /// Methods (HTTP).
        methods,
        /// Methods that it is not (HTTP).
        not_methods,
        /// Paths (HTTP).
        paths,
        /// Paths that it is not (HTTP).
        not_paths,
    }
}

/// One condition on an attribute. Both lists given, both must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", deny_unknown_fields)]
pub struct Condition {
    /// The attribute, such as `source.ip`.
    pub key: String,
    /// Values, one of which it has.
    #[serde(default, deserialize_with = "texts")]
    pub values: Vec<String>,
    /// Values, none of which it has.
    #[serde(default, deserialize_with = "texts")]
    pub not_values: Vec<String>,
}

/// What is written as a mapping. Read by the derived code alone, a list of its fields' values would do as well.
trait FromMapping: Sized {
    fn from_mapping<'de, A: MapAccess<'de>>(mapping: A) -> Result<Self, A::Error>;
}

struct Mapping<T>(PhantomData<T>);

impl<'de, T: FromMapping> Visitor<'de> for Mapping<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a mapping")
    }

    fn visit_map<A: MapAccess<'de>>(self, mapping: A) -> Result<T, A::Error> {
        T::from_mapping(mapping)
    }
}

macro_rules! mappings {
    ($($name:ident),+ $(,)?) => {
        $(
            impl FromMapping for $name {
                fn from_mapping<'de, A: MapAccess<'de>>(mapping: A) -> Result<Self, A::Error> {
                    Self::deserialize(MapAccessDeserializer::new(mapping))
                }
            }

            impl<'de> Deserialize<'de> for $name {
                fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
                    source.deserialize_map(Mapping(PhantomData))
                }
            }
        )+
    };
}

mappings!(
    PeerAuthenticationSpec,
    MutualTls,
    Selector,
    AuthorizationPolicySpec,
    Provider,
    TargetRef,
    Rule,
    From,
    To,
    Source,
    Operation,
    Condition,
);

fn null_as_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(source: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(source)?.unwrap_or_default())
}

fn texts<'de, D: Deserializer<'de>>(source: D) -> Result<Vec<String>, D::Error> {
    let texts: Option<Vec<Text>> = Option::deserialize(source)?;
    Ok(texts.unwrap_or_default().into_iter().map(|text| text.0).collect())
}

fn labels<'de, D: Deserializer<'de>>(source: D) -> Result<BTreeMap<String, String>, D::Error> {
    let labels: Option<BTreeMap<String, Text>> = Option::deserialize(source)?;
    Ok(labels.unwrap_or_default().into_iter().map(|(key, value)| (key, value.0)).collect())
}

/// A text that is one in YAML too: an unquoted number or truth value is an error, as for Kubernetes.
struct Text(String);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        struct TextVisitor;
        impl Visitor<'_> for TextVisitor {
            type Value = Text;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text (put numbers and truth values in quotes)")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Text, E> {
                Ok(Text(text.to_owned()))
            }
        }
        source.deserialize_any(TextVisitor)
    }
}

#[cfg(test)]
mod tests;
