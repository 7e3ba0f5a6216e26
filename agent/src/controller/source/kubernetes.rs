//! Objects from a Kubernetes API server, followed as they change.
//!
//! Enters: the API's lists and watches, one pair for each [`Kind`]. Leaves: a [`Feed`] of objects reduced to what the mesh is made
//! of. A server that is down changes nothing: what was read last stays in force, and a new list is handed on as the differences
//! from it. An object that cannot be used is told of, and what it said before stays in force.

mod follower;
mod ledger;
mod lookup;
mod parse;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::convert::Infallible;

use kube::Client;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use self::follower::Follower;
use super::{About, Change, Feed, FeedWriter, Kind, Source, Waiting, feed};
use crate::controller::kubernetes::resource::Resource;
use crate::observe::ControllerMetrics;
use crate::policy::compile::MeshContext;

/// Sets of changes under way between the kinds and the feed.
const UNDER_WAY: usize = 16;

/// A cluster, by its API server.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
    mesh: MeshContext,
    metrics: ControllerMetrics,
}

/// What one kind has to tell.
#[derive(Debug)]
struct News {
    kind: Kind,
    changes: Vec<Change>,
    /// All objects of the kind that were there when it was asked have been told.
    complete: bool,
    /// Who waits for these changes.
    waiting: Vec<Waiting>,
}

impl Cluster {
    /// The cluster that `client` speaks to. Policies are checked against `mesh`.
    #[must_use]
    pub fn new(client: Client, mesh: MeshContext, metrics: ControllerMetrics) -> Self {
        Self { client, mesh, metrics }
    }
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster").finish_non_exhaustive()
    }
}

impl Source for Cluster {
    type Error = Infallible;

    fn start(self, stop: CancellationToken) -> Result<Feed, Infallible> {
        let (writer, feed) = feed();
        let (news, receiver) = mpsc::channel(UNDER_WAY);
        let (found, mut found_pods) = mpsc::channel(1);
        for kind in Kind::ALL {
            // Only pods are looked up.
            let found =
                if kind == Kind::Pod { std::mem::replace(&mut found_pods, mpsc::channel(1).1) } else { mpsc::channel(1).1 };
            let follower = Follower::new(kind, self.mesh.clone(), news.clone(), self.metrics.clone());
            tokio::spawn(follower.run(self.client.clone(), found));
        }
        let questions = lookup::start(self.client, found);
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = forward(receiver, writer, questions) => {}
            }
        });
        Ok(feed)
    }
}

/// Hands on what the kinds tell, until nobody reads the feed.
async fn forward(mut news: mpsc::Receiver<News>, mut writer: FeedWriter, questions: mpsc::Sender<Waiting>) {
    let mut missing: BTreeSet<Kind> = Kind::ALL.into_iter().collect();
    let mut several = Vec::new();
    loop {
        let (mut changes, mut waiting) = (Vec::new(), Vec::new());
        tokio::select! {
            count = news.recv_many(&mut several, UNDER_WAY) => {
                if count == 0 {
                    return;
                }
                for News { kind, changes: more, complete, waiting: others } in several.drain(..) {
                    changes.extend(more);
                    waiting.extend(others);
                    if complete {
                        missing.remove(&kind);
                    }
                }
            }
            passing = writer.at_barrier(), if missing.is_empty() => {
                let (unsure, sure) = passing.into_iter().partition(|waiting: &Waiting| waiting.about != About::Other);
                waiting = sure;
                ask(&questions, unsure);
                if waiting.is_empty() {
                    continue;
                }
            }
        }
        let heard = if missing.is_empty() {
            writer.send(changes, waiting).await
        } else {
            changes.is_empty() || writer.send_part(changes).await
        };
        if !heard {
            return;
        }
    }
}

/// Has looked up what somebody at the barrier asks about. Beyond what can be looked up they get what is known.
fn ask(questions: &mpsc::Sender<Waiting>, unsure: Vec<Waiting>) {
    for waiting in unsure {
        // Dropping it tells whoever waits that the index may be behind.
        drop(questions.try_send(waiting));
    }
}

/// The API's name of a kind.
pub(in crate::controller) fn resource(kind: Kind) -> Resource {
    let plural = match kind {
        Kind::Node => "nodes",
        Kind::Namespace => "namespaces",
        Kind::Pod => "pods",
        Kind::ServiceAccount => "serviceaccounts",
        Kind::Service => "services",
        Kind::EndpointSlice => "endpointslices",
        Kind::PeerAuthentication => "peerauthentications",
        Kind::AuthorizationPolicy => "authorizationpolicies",
    };
    match kind {
        // The older version differs in nothing that is read here.
        Kind::EndpointSlice => Resource { group: "discovery.k8s.io", versions: &["v1", "v1beta1"], plural },
        Kind::PeerAuthentication | Kind::AuthorizationPolicy => {
            let (group, versions) = kind.group_versions();
            Resource { group, versions, plural }
        }
        Kind::Node | Kind::Namespace | Kind::Pod | Kind::ServiceAccount | Kind::Service => Resource::core(plural),
    }
}
