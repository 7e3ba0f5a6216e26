//! The chart, which is in the binary, rendered.
//!
//! Enters: values, and what the cluster's API offers. Leaves: the objects that make up an installation, in the order in which they are
//! to be made, and the text that they were read from, with its comments.

use serde::Deserialize as _;
use serde_json::{Value, json};

use super::InstallError;
use super::template::Templates;
use super::values::Values;

/// The namespace of an installation, unless the user chooses another.
pub const NAMESPACE: &str = "culvert-system";

macro_rules! chart_files {
    ($($name:literal),+ $(,)?) => {
        &[$(($name, include_str!(concat!("../../../deploy/helm/culvert/", $name)))),+]
    };
}

/// What every template may use.
const LABELS: &str = include_str!("../../../deploy/helm/culvert/templates/_labels.tpl");

/// The templates, in the order in which their objects are made.
const TEMPLATES: &[(&str, &str)] = chart_files![
    "templates/namespace.yaml",
    "templates/priorityquota.yaml",
    "templates/agent-rbac.yaml",
    "templates/controller-rbac.yaml",
    "templates/controller.yaml",
    "templates/agent.yaml",
];

/// The kinds of Istio's that Culvert reads, for clusters that have no Istio.
const DEFINITIONS: &[(&str, &str)] = chart_files!["crds/peerauthentications.yaml", "crds/authorizationpolicies.yaml"];

/// What the cluster's API offers, and where the installation goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The installation's namespace.
    pub namespace: String,
    /// `group/version`, and `group/version/Kind`, as Helm's `.Capabilities.APIVersions` has them.
    pub api_versions: Vec<String>,
}

/// A rendered file.
#[derive(Clone, Debug, PartialEq)]
pub struct Rendered {
    /// The file, below the chart's directory.
    pub name: &'static str,
    /// Its text.
    pub text: String,
    /// The objects in it.
    pub objects: Vec<Value>,
}

impl Target {
    /// A cluster that nobody was asked about: what every release since 1.21 offers, and no more.
    #[must_use]
    pub fn unasked(namespace: &str) -> Self {
        Self { namespace: namespace.to_owned(), api_versions: ["v1", "apps/v1", "policy/v1"].map(str::to_owned).into() }
    }
}

/// Renders the chart for a cluster.
///
/// # Errors
/// [`InstallError::Template`] and [`InstallError::Object`]: the chart and this program do not fit each other.
pub fn render(values: &Values, target: &Target) -> Result<Vec<Rendered>, InstallError> {
    let scope = json!({
        "Values": values.as_value(),
        "Release": {"Name": "culvert", "Namespace": target.namespace, "Service": "culvert"},
        "Chart": {"Name": "culvert", "AppVersion": env!("CARGO_PKG_VERSION")},
        "Capabilities": {"APIVersions": target.api_versions},
    });
    let mut templates = Templates::default();
    let failed = |name| move |source| InstallError::Template { name, source };
    templates.render(LABELS, &scope).map_err(failed("templates/_labels.tpl"))?;
    let rendered = TEMPLATES.iter().map(|(name, text)| {
        let text = templates.render(text, &scope).map_err(failed(name))?;
        read(name, text)
    });
    rendered.filter(|rendered| rendered.as_ref().map_or(true, |rendered| !rendered.objects.is_empty())).collect()
}

/// The definitions of the kinds that Culvert reads.
///
/// # Errors
/// [`InstallError::Object`] when one is no YAML.
pub fn definitions() -> Result<Vec<Rendered>, InstallError> {
    DEFINITIONS.iter().map(|(name, text)| read(name, (*text).to_owned())).collect()
}

/// All of it as one text that `kubectl apply` takes.
#[must_use]
pub fn manifest<'a>(rendered: impl IntoIterator<Item = &'a Rendered>) -> String {
    let texts = rendered.into_iter().map(|rendered| format!("---\n# {}\n{}\n", rendered.name, rendered.text.trim()));
    texts.collect()
}

fn read(name: &'static str, text: String) -> Result<Rendered, InstallError> {
    let failed = |source| InstallError::Object { name, source };
    let documents = serde_yaml_ng::Deserializer::from_str(&text).map(Value::deserialize);
    let objects = documents.filter(|document| !matches!(document, Ok(Value::Null))).collect::<Result<_, _>>().map_err(failed)?;
    Ok(Rendered { name, text, objects })
}

#[cfg(test)]
mod tests;
