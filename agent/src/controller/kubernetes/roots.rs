//! Publishes the roots to trust where agents and others find them.
//!
//! Enters: the authority's roots, the namespaces with enrolled pods, and what is published now. Leaves: a ConfigMap in each of those
//! namespaces and in the system namespace, and a ClusterTrustBundle where and as soon as the API has them. What somebody else changed
//! or removed is put right. A namespace that no longer has enrolled pods keeps its ConfigMap: jobs come and go, and it holds no secret.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::Client;
use rustls_pki_types::CertificateDer;
use serde_json::json;
use serde_json::value::RawValue;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::api::{self, ApiError};
use super::follow::{self, Collection, Event};
use super::resource::Resource;
use crate::backoff::Backoff;
use crate::controller::authority::pem_of;

/// The ConfigMap's name.
pub const CONFIG_MAP: &str = "culvert-root-cert";
/// The key that the roots are under, PEM one after the other.
pub const KEY: &str = "root-cert.pem";
/// The ClusterTrustBundle's name, which must begin with the signer's.
pub const TRUST_BUNDLE: &str = "culvert.dev:mesh:root";
/// The signer whose certificates the roots are for.
pub const SIGNER: &str = "culvert.dev/mesh";

const TRUST_BUNDLES: Resource =
    Resource { group: "certificates.k8s.io", versions: &["v1", "v1beta1", "v1alpha1"], plural: "clustertrustbundles" };
/// The namespace of what is in none.
const NOWHERE: &str = "";
/// The first and the longest wait after a failure.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// The least time between two rounds, so that two replicas that differ for a moment do not chase each other.
const ROUND: Duration = Duration::from_millis(200);

/// Publishes until `stop` is cancelled. `system` is the controller's own namespace.
pub fn start(
    client: Client,
    system: String,
    roots: watch::Receiver<Arc<[CertificateDer<'static>]>>,
    namespaces: watch::Receiver<BTreeSet<Arc<str>>>,
    stop: CancellationToken,
) {
    let collection = Collection {
        resource: Resource::core("configmaps"),
        namespace: None,
        fields: Some(format!("metadata.name={CONFIG_MAP}")),
    };
    let maps = follow::start(client.clone(), collection);
    let collection =
        Collection { resource: TRUST_BUNDLES, namespace: None, fields: Some(format!("metadata.name={TRUST_BUNDLE}")) };
    let bundles = follow::start(client.clone(), collection);
    let publisher = Publisher { client, system, maps: Published::new(read_map), bundles: Published::new(read_bundle) };
    tokio::spawn(async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = publisher.run(roots, namespaces, maps, bundles) => {}
        }
    });
}

struct Publisher {
    client: Client,
    system: String,
    /// The ConfigMaps, by namespace.
    maps: Published,
    /// The ClusterTrustBundle, which is in no namespace.
    bundles: Published,
}

/// What is published now in the objects of one kind.
struct Published {
    /// The text in each namespace that has the object.
    texts: BTreeMap<String, String>,
    listed: BTreeMap<String, String>,
    /// Whether `texts` is known by now: not before the first list, nor where the API has no such kind.
    known: bool,
    read: fn(&RawValue) -> Option<(String, String)>,
}

impl Publisher {
    async fn run(
        mut self,
        mut roots: watch::Receiver<Arc<[CertificateDer<'static>]>>,
        mut namespaces: watch::Receiver<BTreeSet<Arc<str>>>,
        mut maps: mpsc::Receiver<Event>,
        mut bundles: mpsc::Receiver<Event>,
    ) {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        loop {
            let text: String = roots.borrow_and_update().iter().map(pem_of).collect();
            let wanted = namespaces.borrow_and_update().iter().map(ToString::to_string).chain([self.system.clone()]).collect();
            let retry = match self.publish(&text, &wanted).await {
                true => {
                    backoff.reset();
                    Duration::MAX
                }
                false => backoff.next_wait(),
            };
            tokio::time::sleep(ROUND).await;
            let alive = tokio::select! {
                changed = roots.changed() => changed.is_ok(),
                changed = namespaces.changed() => changed.is_ok(),
                event = maps.recv() => event.map(|event| self.maps.note(event)).is_some(),
                event = bundles.recv() => event.map(|event| self.bundles.note(event)).is_some(),
                () = tokio::time::sleep(retry) => true,
            };
            if !alive {
                return;
            }
            while let Ok(event) = maps.try_recv() {
                self.maps.note(event);
            }
            while let Ok(event) = bundles.try_recv() {
                self.bundles.note(event);
            }
        }
    }

    /// Writes what differs. Gives whether everything is as it should be.
    async fn publish(&mut self, text: &str, namespaces: &BTreeSet<String>) -> bool {
        let mut well = true;
        for namespace in namespaces.iter().filter(|_| self.maps.known) {
            if self.maps.has(namespace, text) {
                continue;
            }
            match self.apply(namespace, text).await {
                Ok(()) => {
                    debug!(namespace, "published the roots");
                    self.maps.texts.insert(namespace.clone(), text.to_owned());
                }
                // A namespace that is being removed takes nothing, and needs nothing.
                Err(error) if error.is_absent() || is_ending(&error) => debug!(namespace, %error, "roots not published"),
                Err(error) => {
                    warn!("the roots are not published in namespace {namespace}: {error}");
                    well = false;
                }
            }
        }
        if self.bundles.known && !self.bundles.has(NOWHERE, text) {
            match self.apply_bundle(text).await {
                Ok(()) => drop(self.bundles.texts.insert(NOWHERE.to_owned(), text.to_owned())),
                Err(error) => {
                    warn!("the roots are not published as ClusterTrustBundle {TRUST_BUNDLE}: {error}");
                    well = false;
                }
            }
        }
        well
    }

    async fn apply(&self, namespace: &str, text: &str) -> Result<(), ApiError> {
        let path = format!("/api/v1/namespaces/{namespace}/configmaps/{CONFIG_MAP}");
        let object = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": { "name": CONFIG_MAP, "namespace": namespace, "labels": { "app.kubernetes.io/part-of": "culvert" } },
            "data": { KEY: text },
        });
        api::apply(&self.client, &path, &object).await
    }

    async fn apply_bundle(&self, text: &str) -> Result<(), ApiError> {
        let Some(offered) = TRUST_BUNDLES.offered(&self.client).await? else { return Ok(()) };
        let path = format!("{}/{TRUST_BUNDLE}", offered.collection(None));
        let object = json!({
            "apiVersion": offered.api_version(),
            "kind": "ClusterTrustBundle",
            "metadata": { "name": TRUST_BUNDLE, "labels": { "app.kubernetes.io/part-of": "culvert" } },
            "spec": { "signerName": SIGNER, "trustBundle": text },
        });
        api::apply(&self.client, &path, &object).await?;
        info!("published the roots as ClusterTrustBundle {TRUST_BUNDLE} ({})", offered.api_version());
        Ok(())
    }
}

impl Published {
    fn new(read: fn(&RawValue) -> Option<(String, String)>) -> Self {
        Self { texts: BTreeMap::new(), listed: BTreeMap::new(), known: false, read }
    }

    /// Whether this text is published in a namespace.
    fn has(&self, namespace: &str, text: &str) -> bool {
        self.texts.get(namespace).is_some_and(|published| published == text)
    }

    fn note(&mut self, event: Event) {
        let read = self.read;
        match event {
            Event::Listed(objects) => self.listed.extend(objects.iter().filter_map(|object| read(object))),
            Event::Complete(_) => {
                self.texts = std::mem::take(&mut self.listed);
                self.known = true;
            }
            Event::Changed(object) => self.texts.extend(read(&object)),
            Event::Removed(object) => drop(read(&object).and_then(|(namespace, _)| self.texts.remove(&namespace))),
            Event::Absent => self.known = false,
            Event::Reached(_) => {}
            Event::Failed(error) => debug!(%error, "the published roots are not followed"),
        }
    }
}

/// The namespace of a ConfigMap, and what it publishes.
fn read_map(object: &RawValue) -> Option<(String, String)> {
    let map: ConfigMap = serde_json::from_str(object.get()).ok()?;
    Some((map.metadata.namespace?, map.data.and_then(|mut data| data.remove(KEY)).unwrap_or_default()))
}

/// What a ClusterTrustBundle publishes. It is read by the one field that all versions of it have.
fn read_bundle(object: &RawValue) -> Option<(String, String)> {
    let bundle: serde_json::Value = serde_json::from_str(object.get()).ok()?;
    Some((NOWHERE.to_owned(), bundle["spec"]["trustBundle"].as_str().unwrap_or_default().to_owned()))
}

/// Whether the namespace is being removed.
fn is_ending(error: &ApiError) -> bool {
    matches!(error, ApiError::Refused { code: 403, message, .. } if message.contains("being terminated"))
}

#[cfg(test)]
mod tests;
