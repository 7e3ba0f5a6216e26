//! Putting Culvert on a cluster, or bringing what is there up to date.
//!
//! Enters: values and a cluster. Leaves: the chart's objects, applied. The controller goes first, so that no agent is newer than the
//! controller that it asks; agents come when it serves. What is applied twice is the same as once.

use std::time::Duration;

use serde_json::Value;

use super::chart::{self, Target};
use super::cluster::{Cluster, ClusterError, ObjectRef};
use super::rollout::{self, Progress};
use super::{InstallError, Values};

/// What is to be installed.
#[derive(Clone, Debug)]
pub struct Installation {
    /// The chart's values.
    pub values: Values,
    /// Where.
    pub namespace: String,
    /// Whether to make the kinds that policies are written in where the cluster lacks them.
    pub definitions: bool,
    /// How long each of the two workloads may take to roll out.
    pub limit: Duration,
}

/// What happened to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It was not there.
    Made,
    /// It was there, and is another now.
    Changed,
    /// It was there, the same.
    Unchanged,
    /// It was there, and is not Culvert's to change.
    Kept,
    /// It is gone.
    Removed,
}

/// A step that is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// An object.
    Object(ObjectRef, Change),
    /// A workload on its way.
    Rollout(ObjectRef, Progress),
}

/// Installs or upgrades, and returns when all runs. `tell` hears of each step.
///
/// # Errors
/// [`InstallError`] of the first step that failed; what was done before stays, and another try goes on from there.
pub async fn install(cluster: &Cluster, installation: &Installation, mut tell: impl FnMut(Step)) -> Result<(), InstallError> {
    let target = Target { namespace: installation.namespace.clone(), api_versions: cluster.api_versions().to_vec() };
    let rendered = chart::render(&installation.values, &target)?;
    if installation.definitions {
        for definition in chart::definitions()?.iter().flat_map(|file| &file.objects) {
            let reference = ObjectRef::of(definition);
            let change = make_if_absent(cluster, &reference, definition).await?;
            tell(Step::Object(reference, change));
        }
    }
    let objects = rendered.iter().flat_map(|file| &file.objects);
    let (agents, others): (Vec<&Value>, Vec<&Value>) = objects.partition(|object| object["kind"] == "DaemonSet");
    for objects in [others, agents] {
        for object in &objects {
            let reference = ObjectRef::of(object);
            let change = apply(cluster, &reference, object).await?;
            tell(Step::Object(reference, change));
        }
        for workload in objects.iter().map(|object| ObjectRef::of(object)).filter(|object| is_workload(&object.kind)) {
            rollout::wait(cluster, &workload, installation.limit, |progress| tell(Step::Rollout(workload.clone(), progress)))
                .await?;
        }
    }
    Ok(())
}

fn is_workload(kind: &str) -> bool {
    matches!(kind, "Deployment" | "DaemonSet")
}

async fn apply(cluster: &Cluster, reference: &ObjectRef, object: &Value) -> Result<Change, ClusterError> {
    let before = cluster.get(reference).await?;
    let after = cluster.apply(object).await?;
    Ok(match before {
        None => Change::Made,
        Some(before) if before["metadata"]["resourceVersion"] == after["metadata"]["resourceVersion"] => Change::Unchanged,
        Some(_) => Change::Changed,
    })
}

async fn make_if_absent(cluster: &Cluster, reference: &ObjectRef, object: &Value) -> Result<Change, ClusterError> {
    if cluster.get(reference).await?.is_some() {
        return Ok(Change::Kept);
    }
    match cluster.create(object).await {
        Ok(_) => Ok(Change::Made),
        // Somebody else made it meanwhile.
        Err(ClusterError::Request { status: Some(409), .. }) => Ok(Change::Kept),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests;
