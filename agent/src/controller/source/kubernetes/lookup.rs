//! Asks the API server itself about pods that the watch may not have told of yet.
//!
//! Enters: those who wait at the barrier. Leaves: the pods found, for the pods' follower, which passes on whoever waits behind
//! them. At most a few questions at a time, and not too often: strangers' connections lead to them.

use std::time::Duration;

use futures_util::future::join_all;
use kube::Client;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tracing::debug;

use crate::controller::kubernetes::api;
use crate::controller::kubernetes::follow::with_query;
use crate::controller::source::{About, Waiting};

/// Who may wait for their turn.
const QUEUE: usize = 1024;
/// The most questions of one round; who asks beyond that gets what is known.
const ROUND: usize = 8;
/// The least time between the starts of two rounds.
const INTERVAL: Duration = Duration::from_millis(50);
/// The most pods in one answer.
const LIMIT: usize = 500;

/// What a round found.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) objects: Vec<Box<RawValue>>,
    pub(super) waiting: Vec<Waiting>,
}

#[derive(Deserialize)]
struct List {
    items: Option<Vec<Box<RawValue>>>,
}

/// Starts looking up, until nobody wants what is found.
pub(super) fn start(client: Client, found: mpsc::Sender<Found>) -> mpsc::Sender<Waiting> {
    let (questions, mut receiver) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        let mut waiting: Vec<Waiting> = Vec::new();
        while receiver.recv_many(&mut waiting, QUEUE).await > 0 {
            let next = Instant::now() + INTERVAL;
            let (abouts, waiting) = round(std::mem::take(&mut waiting));
            let answers = join_all(abouts.iter().map(|about| look_up(&client, about))).await;
            let failed: Vec<&About> =
                abouts.iter().zip(&answers).filter(|(_, found)| found.is_none()).map(|(about, _)| about).collect();
            let waiting = waiting.into_iter().filter(|waiting| !failed.contains(&&waiting.about)).collect();
            let objects = answers.into_iter().flatten().flatten().collect();
            if found.send(Found { objects, waiting }).await.is_err() {
                return;
            }
            sleep_until(next).await;
        }
    });
    questions
}

/// The questions of one round, and who asked them. The others learn that the index may be behind.
fn round(waiting: Vec<Waiting>) -> (Vec<About>, Vec<Waiting>) {
    let mut abouts: Vec<About> = Vec::new();
    let taken = waiting.into_iter().filter(|waiting| {
        let known = abouts.contains(&waiting.about);
        if !known && abouts.len() < ROUND {
            abouts.push(waiting.about.clone());
            return true;
        }
        known
    });
    let taken = taken.collect();
    (abouts, taken)
}

async fn look_up(client: &Client, about: &About) -> Option<Vec<Box<RawValue>>> {
    let (path, fields) = match about {
        About::Pods { namespace, node } => (format!("/api/v1/namespaces/{namespace}/pods"), format!("spec.nodeName={node}")),
        About::Address(address) => ("/api/v1/pods".to_owned(), format!("status.podIP={address}")),
        About::Other => return Some(Vec::new()),
    };
    let path = with_query(&path, &[("fieldSelector", fields), ("limit", LIMIT.to_string())]);
    match api::get::<List>(client, &path).await {
        Ok(list) => Some(list.items.unwrap_or_default()),
        Err(error) => {
            debug!(%error, ?about, "cannot look up");
            None
        }
    }
}
