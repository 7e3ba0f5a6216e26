//! Follows a collection of objects: its whole content, then each change, for as long as somebody listens.
//!
//! Enters: a [`Resource`], perhaps confined to a namespace or by a field. Leaves: [`Event`]s. The list is read in pages. A server
//! that is down, forgets how far we were (410) or offers another version of the API is met with waiting and a new list, between
//! [`Event::Listed`] and [`Event::Complete`]; what is left out of that list is gone, and until then nothing is. A resource that
//! the server does not offer is looked for again and again: a definition of a custom resource may come at any time, and to watch
//! for it would take the right to read them all.

use std::time::Duration;

use futures_util::{AsyncBufRead, AsyncBufReadExt as _, StreamExt as _};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ListMeta;
use kube::Client;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tracing::debug;

use super::api::{self, ApiError};
use super::resource::{Offered, Resource};
use crate::backoff::Backoff;

/// Objects in one page of a list.
const PAGE: u32 = 500;
/// Events under way to who listens.
const UNDER_WAY: usize = 16;
/// The life of one watch, in seconds, after which it is asked for anew.
const WATCH: u64 = 290;
/// A watch that says nothing for this long is dead: the server sends a bookmark about once a minute.
const SILENCE: Duration = Duration::from_secs(180);
/// A watch that ended sooner was not a success.
const SHORT: Duration = Duration::from_secs(1);
/// How often a resource that is not offered is looked for.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// The first and the longest wait after a failure.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// What to follow.
#[derive(Clone, Debug)]
pub struct Collection {
    /// The kind of object.
    pub resource: Resource,
    /// The namespace; none for all.
    pub namespace: Option<String>,
    /// A field selector; none for all.
    pub fields: Option<String>,
}

/// What there is to tell of a collection.
#[derive(Debug)]
pub enum Event {
    /// Some of the objects of a new list.
    Listed(Vec<Box<RawValue>>),
    /// The list is told whole, as of this version of the collection: every object that was not in it is gone.
    Complete(String),
    /// An object is new or has changed.
    Changed(Box<RawValue>),
    /// An object is gone.
    Removed(Box<RawValue>),
    /// There was nothing else up to this version of the collection.
    Reached(String),
    /// The server offers no such resource: there are no objects.
    Absent,
    /// The server does not answer, or refuses. What was told stays true until there is other news.
    Failed(ApiError),
}

/// How a step ended.
enum Ended {
    /// Nobody listens any more.
    Unheard,
    /// The version of the collection that was followed up to, or none when a new list is needed.
    At(Option<String>),
}

/// Starts following. Ends when the receiver is dropped.
#[must_use]
pub fn start(client: Client, collection: Collection) -> mpsc::Receiver<Event> {
    let (events, receiver) = mpsc::channel(UNDER_WAY);
    tokio::spawn(async move {
        let follower = Follower { client, collection, events: events.clone() };
        tokio::select! {
            () = follower.run() => {}
            () = events.closed() => {}
        }
    });
    receiver
}

struct Follower {
    client: Client,
    collection: Collection,
    events: mpsc::Sender<Event>,
}

#[derive(Deserialize)]
struct Page {
    metadata: ListMeta,
    items: Option<Vec<Box<RawValue>>>,
}

#[derive(Deserialize)]
struct Line<'a> {
    #[serde(rename = "type")]
    change: &'a str,
    #[serde(borrow)]
    object: &'a RawValue,
}

#[derive(Deserialize)]
struct Versioned {
    metadata: ListMeta,
}

/// The `Status` that a watch may end with.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Failure {
    code: u16,
    reason: String,
    message: String,
}

impl Follower {
    async fn run(&self) {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        let mut position: Option<(Offered, String)> = None;
        loop {
            let began = Instant::now();
            let step = match &position {
                Some((offered, version)) => self.watch(*offered, version.clone()).await.map(|ended| (*offered, ended)),
                None => match self.collection.resource.offered(&self.client).await {
                    Ok(Some(offered)) => self.list(offered).await.map(|ended| (offered, ended)),
                    Ok(None) => {
                        if !self.tell(Event::Absent).await {
                            return;
                        }
                        sleep(LOOK_AGAIN).await;
                        continue;
                    }
                    Err(error) => Err(error),
                },
            };
            match step {
                Ok((_, Ended::Unheard)) => return,
                Ok((offered, Ended::At(version))) => {
                    let listed = position.is_none();
                    position = version.map(|version| (offered, version));
                    // A server that ends each watch at once, or forgets each list, must not be asked without a pause.
                    if began.elapsed() >= SHORT {
                        backoff.reset();
                    } else if !listed || position.is_none() {
                        sleep(backoff.next_wait()).await;
                    }
                }
                Err(error) => {
                    // Whatever the server answered, a new list is right; one that cannot be reached will remember us.
                    if error.code().is_some() {
                        position = None;
                    }
                    if !self.tell(Event::Failed(error)).await {
                        return;
                    }
                    sleep(backoff.next_wait()).await;
                }
            }
        }
    }

    /// Tells the whole content.
    async fn list(&self, offered: Offered) -> Result<Ended, ApiError> {
        let mut next: Option<String> = None;
        loop {
            let mut query = vec![("limit", PAGE.to_string())];
            query.extend(self.fields());
            query.extend(next.take().map(|token| ("continue", token)));
            let path = with_query(&self.path(offered), &query);
            let text = match api::text(&self.client, &path).await {
                Ok(text) => text,
                // The pages took too long: the server no longer knows the state that they are of.
                Err(error) if error.code() == Some(410) => return Ok(Ended::At(None)),
                Err(error) => return Err(error),
            };
            let page: Page = serde_json::from_str(&text).map_err(|cause| ApiError::Malformed { request: path, cause })?;
            drop(text);
            if !self.tell(Event::Listed(page.items.unwrap_or_default())).await {
                return Ok(Ended::Unheard);
            }
            next = page.metadata.continue_.filter(|token| !token.is_empty());
            if next.is_none() {
                let version = page.metadata.resource_version.unwrap_or_default();
                let heard = self.tell(Event::Complete(version.clone())).await;
                return Ok(if heard { Ended::At(Some(version)) } else { Ended::Unheard });
            }
        }
    }

    /// Tells changes since `version`, for the life of one watch.
    async fn watch(&self, offered: Offered, mut version: String) -> Result<Ended, ApiError> {
        let mut query = vec![("watch", "true".to_owned()), ("allowWatchBookmarks", "true".to_owned())];
        query.extend([("timeoutSeconds", WATCH.to_string()), ("resourceVersion", version.clone())]);
        query.extend(self.fields());
        let path = with_query(&self.path(offered), &query);
        let subject = format!("GET {path}");
        let opened = timeout(SILENCE, self.client.request_stream(api::reading(&path)?)).await;
        let stream = match opened {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                let error = ApiError::of(&error, &subject);
                return if error.code() == Some(410) { Ok(Ended::At(None)) } else { Err(error) };
            }
            Err(_elapsed) => return Err(ApiError::Late(subject)),
        };
        let mut lines = std::pin::pin!(lines(stream));
        loop {
            let line = match timeout(SILENCE, lines.next()).await {
                Ok(Some(Ok(line))) => line,
                // The end of a watch says nothing about its objects.
                Ok(None) | Err(_) => return Ok(Ended::At(Some(version))),
                Ok(Some(Err(error))) => {
                    debug!(%error, path, "a watch broke off");
                    return Ok(Ended::At(Some(version)));
                }
            };
            match self.tell_line(&line, &subject, &mut version).await? {
                None => {}
                Some(ended) => return Ok(ended),
            }
        }
    }

    /// Tells one line of a watch. Gives how the watch ends, if it does.
    async fn tell_line(&self, line: &str, subject: &str, version: &mut String) -> Result<Option<Ended>, ApiError> {
        let malformed = |cause| ApiError::Malformed { request: subject.to_owned(), cause };
        let Line { change, object } = serde_json::from_str(line).map_err(malformed)?;
        if change == "ERROR" {
            let Failure { code, reason, message } = serde_json::from_str(object.get()).map_err(malformed)?;
            if code == 410 || reason == "Expired" || reason == "Gone" {
                debug!(subject, message, "the server no longer knows where we were");
                return Ok(Some(Ended::At(None)));
            }
            return Err(ApiError::Refused { request: subject.to_owned(), code, reason, message });
        }
        let versioned: Versioned = serde_json::from_str(object.get()).map_err(malformed)?;
        if let Some(reached) = versioned.metadata.resource_version {
            *version = reached;
        }
        let event = match change {
            "ADDED" | "MODIFIED" => Event::Changed(object.to_owned()),
            "DELETED" => Event::Removed(object.to_owned()),
            _ => Event::Reached(version.clone()),
        };
        Ok(if self.tell(event).await { None } else { Some(Ended::Unheard) })
    }

    async fn tell(&self, event: Event) -> bool {
        self.events.send(event).await.is_ok()
    }

    fn path(&self, offered: Offered) -> String {
        offered.collection(self.collection.namespace.as_deref())
    }

    fn fields(&self) -> Option<(&'static str, String)> {
        Some(("fieldSelector", self.collection.fields.clone()?))
    }
}

fn lines(stream: impl AsyncBufRead) -> impl futures_util::Stream<Item = std::io::Result<String>> {
    // Boxed, since the adaptor wants a stream that can be moved.
    Box::pin(stream).lines()
}

/// A path with a query, whose values are escaped.
pub(in crate::controller) fn with_query(path: &str, query: &[(&str, String)]) -> String {
    let mut text = path.to_owned();
    for (index, (key, value)) in query.iter().enumerate() {
        text.push(if index == 0 { '?' } else { '&' });
        text.push_str(key);
        text.push('=');
        for byte in value.bytes() {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => text.push(char::from(byte)),
                _ => text.push_str(&format!("%{byte:02X}")),
            }
        }
    }
    text
}
