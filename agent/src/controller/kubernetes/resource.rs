//! Which of an API's versions the server offers, found by asking it: never by comparing versions of Kubernetes.
//!
//! Enters: a [`Resource`], which names versions in the order of preference. Leaves: the first that is offered, and where its
//! objects are.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{APIGroup, APIResourceList};
use kube::Client;
use serde::de::DeserializeOwned;

use super::api::{self, ApiError};

/// A kind of object, as the API names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resource {
    /// The API group; empty for the core.
    pub group: &'static str,
    /// The versions that are understood, the preferred one first.
    pub versions: &'static [&'static str],
    /// The name in paths.
    pub plural: &'static str,
}

/// A version that the server offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offered {
    /// The resource.
    pub resource: Resource,
    /// One of the resource's versions.
    pub version: &'static str,
    /// Whether its objects have a status of their own to write to.
    pub status: bool,
}

impl Resource {
    /// A kind of the core group.
    #[must_use]
    pub const fn core(plural: &'static str) -> Self {
        Self { group: "", versions: &["v1"], plural }
    }

    /// The preferred version that the server offers; none when it offers none. The core group is always there.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn offered(self, client: &Client) -> Result<Option<Offered>, ApiError> {
        let Self { group, versions, plural } = self;
        if group.is_empty() {
            return Ok(Some(Offered { resource: self, version: "v1", status: false }));
        }
        let Some(known) = lookup::<APIGroup>(client, &format!("/apis/{group}")).await? else { return Ok(None) };
        for version in versions.iter().filter(|version| known.versions.iter().any(|known| known.version == **version)) {
            let Some(list) = lookup::<APIResourceList>(client, &format!("/apis/{group}/{version}")).await? else { continue };
            if list.resources.iter().any(|resource| resource.name == plural) {
                let status = list.resources.iter().any(|resource| resource.name == format!("{plural}/status"));
                return Ok(Some(Offered { resource: self, version, status }));
            }
        }
        Ok(None)
    }
}

impl Offered {
    /// The path of the collection: of one namespace, or of the whole cluster.
    #[must_use]
    pub fn collection(self, namespace: Option<&str>) -> String {
        let Self { resource: Resource { group, plural, .. }, version, .. } = self;
        let root = if group.is_empty() { format!("/api/{version}") } else { format!("/apis/{group}/{version}") };
        match namespace {
            Some(namespace) => format!("{root}/namespaces/{namespace}/{plural}"),
            None => format!("{root}/{plural}"),
        }
    }

    /// The `apiVersion` of its objects.
    #[must_use]
    pub fn api_version(self) -> String {
        let Self { resource: Resource { group, .. }, version, .. } = self;
        if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") }
    }
}

/// A document of the API's own; none where there is nothing at the path.
async fn lookup<T: DeserializeOwned>(client: &Client, path: &str) -> Result<Option<T>, ApiError> {
    match api::get(client, path).await {
        Ok(document) => Ok(Some(document)),
        Err(error) if error.is_absent() => Ok(None),
        Err(error) => Err(error),
    }
}
