//! One kind of object: its list and its changes, as what is different from before.

use kube::Client;
use serde_json::value::RawValue;
use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use super::ledger::Ledger;
use super::lookup::Found;
use super::{News, resource};
use crate::controller::kubernetes::follow::{self, Collection, Event};
use crate::controller::source::{Change, Kind};
use crate::observe::ControllerMetrics;
use crate::policy::compile::MeshContext;

/// The most events that are put together, while more are there already.
const TOGETHER: usize = 64;

/// Follows one kind.
pub(super) struct Follower {
    kind: Kind,
    ledger: Ledger,
    news: mpsc::Sender<News>,
    /// What was last told of the connection: `Some` when it failed.
    failing: Option<String>,
    absent: bool,
    metrics: ControllerMetrics,
}

impl Follower {
    pub(super) fn new(kind: Kind, mesh: MeshContext, news: mpsc::Sender<News>, metrics: ControllerMetrics) -> Self {
        Self { kind, ledger: Ledger::new(kind, mesh), news, failing: None, absent: false, metrics }
    }

    /// Follows until nobody reads the news.
    pub(super) async fn run(mut self, client: Client, mut found: mpsc::Receiver<Found>) {
        let collection = Collection { resource: resource(self.kind), namespace: None, fields: None };
        let mut events = follow::start(client, collection);
        let mut several = Vec::new();
        loop {
            let mut news = News { kind: self.kind, changes: Vec::new(), complete: false, waiting: Vec::new() };
            tokio::select! {
                count = events.recv_many(&mut several, TOGETHER) => {
                    if count == 0 {
                        return;
                    }
                    for event in several.drain(..) {
                        news.complete |= self.take(event, &mut news.changes);
                    }
                }
                Some(Found { objects, waiting }) = found.recv() => {
                    news.changes.extend(objects.iter().filter_map(|object| self.ledger.found(object)));
                    news.waiting = waiting;
                }
            }
            let anything = !news.changes.is_empty() || news.complete || !news.waiting.is_empty();
            if anything && self.news.send(news).await.is_err() {
                return;
            }
        }
    }

    /// Takes an event in. Gives whether all objects have been told.
    fn take(&mut self, event: Event, changes: &mut Vec<Change>) -> bool {
        self.note(&event);
        let all = |ledger: &mut Ledger, objects: &[Box<RawValue>]| {
            objects.iter().filter_map(|object| ledger.listed(object)).collect::<Vec<_>>()
        };
        match event {
            Event::Listed(objects) => changes.extend(all(&mut self.ledger, &objects)),
            Event::Complete(version) => {
                changes.extend(self.ledger.complete(&version));
                return true;
            }
            Event::Changed(object) => changes.extend(self.ledger.changed(&object)),
            Event::Removed(object) => changes.extend(self.ledger.removed(&object)),
            Event::Reached(version) => self.ledger.reach(&version),
            Event::Absent => {
                changes.extend(self.ledger.clear());
                return true;
            }
            Event::Failed(_) => {}
        }
        false
    }

    /// Tells the operator what has changed about the connection, once.
    fn note(&mut self, event: &Event) {
        let kind = self.kind.as_str();
        self.metrics.watch(kind, !matches!(event, Event::Failed(_) | Event::Absent));
        match event {
            Event::Failed(error) => {
                let text = error.to_string();
                if self.failing.is_none() {
                    warn!("{kind} objects are not followed, what was read last stays in force: {text}");
                } else if self.failing.as_ref() != Some(&text) {
                    debug!("{kind} objects are still not followed: {text}");
                }
                self.failing = Some(text);
            }
            Event::Absent => {
                if !std::mem::replace(&mut self.absent, true) {
                    info!("the API server has no {kind} objects (the definition is not installed): looking for it again");
                }
                self.failing = None;
            }
            Event::Listed(_) | Event::Complete(_) | Event::Changed(_) | Event::Removed(_) | Event::Reached(_) => {
                if self.failing.take().is_some() || std::mem::take(&mut self.absent) {
                    info!("{kind} objects are followed");
                }
            }
        }
    }
}
