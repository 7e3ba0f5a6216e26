//! Culvert on a cluster: its objects, put there and taken away.
//!
//! Enters: the operator's values and a cluster. Leaves: the chart's objects, applied in an order in which each finds what it needs, or
//! nothing at all of Culvert's. The chart of `deploy/helm` is the only place that says what an installation consists of; Helm,
//! this program and the plain manifests render the same.

pub mod chart;
pub mod cluster;
#[cfg(test)]
pub(crate) mod fake_api;
pub mod install;
pub mod rollout;
mod template;
pub mod uninstall;
pub mod values;

pub use cluster::{Cluster, ClusterError};
pub use template::TemplateError;
pub use values::{Values, ValuesError};

/// Why an installation does not come about.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// A template of the chart cannot be rendered.
    #[error("the chart's {name}: {source}")]
    Template {
        /// The template.
        name: &'static str,
        /// Why.
        source: TemplateError,
    },
    /// What a template renders to is no object.
    #[error("the chart's {name} renders to what is no object: {source}")]
    Object {
        /// The template.
        name: &'static str,
        /// Why.
        source: serde_yaml_ng::Error,
    },
    /// The values cannot be.
    #[error(transparent)]
    Values(#[from] ValuesError),
    /// The cluster did not do it.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
}
