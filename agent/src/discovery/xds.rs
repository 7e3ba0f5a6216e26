//! The one stream to the controller: delta xDS, wildcard subscriptions, acknowledgements, and reconnecting.
//!
//! Enters: responses and questions. Leaves: requests, snapshots, and word of whether the controller is there. It reconnects for
//! ever, and tells a new stream what it holds, so that only what differs is sent: the first one, too, if there was an agent before
//! this one. It never lets the last snapshot go.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use prost_types::value::Kind as ValueKind;
use prost_types::{Struct, Value};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use tracing::{debug, info, warn};

use super::decode::{DecodeError, quote};
use super::keep::{self, Keeper};
use super::mirror::{Kind, Mirror};
use super::questions::Questions;
use super::{DiscoveryConfig, Question, ResolveError};
use crate::backoff::Backoff;
use crate::identity::channel::{ConnectError, ControllerEndpoint, in_words, needs_operator};
use crate::model::Snapshot;
use crate::proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use crate::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Status as Detail};

const RECONNECT_LEAST: Duration = Duration::from_millis(200);
const RECONNECT_MOST: Duration = Duration::from_secs(15);
/// A stream that lasted this long was in order: the waits start anew.
const GOOD_STREAM: Duration = Duration::from_secs(2);
/// How long a control plane may take to take up the stream; one that has nothing to say yet may hold its first words back.
const OPEN_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the mesh's settings are waited for once all else is answered.
const MESH_PATIENCE: Duration = Duration::from_secs(2);
/// The largest response: a mesh of some hundred thousand workloads.
const RESPONSE_LIMIT: usize = 128 << 20;
/// Requests that the controller has not read. One that reads nothing is not served any longer.
const BACKLOG: usize = 1024;
/// The most questions that one request carries.
const BATCH: usize = 256;
/// How many refused resources a response's log lines and answer name.
const REFUSED_NAMED: usize = 8;

/// The client of discovery.
pub(super) struct Client {
    config: DiscoveryConfig,
    mirror: Mirror,
    /// Takes note of what is held, once it was looked at what a predecessor kept; none if that cannot be.
    keeper: Option<Keeper>,
    recalled: bool,
    questions: Questions,
    incoming: mpsc::Receiver<Question>,
    snapshots: watch::Sender<Arc<Snapshot>>,
    connected: watch::Sender<bool>,
    outage: Outage,
}

type Requests = mpsc::Sender<DeltaDiscoveryRequest>;

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error("no connection")]
    Connect(#[source] tonic::transport::Error),
    #[error("no token")]
    Token(#[source] ConnectError),
    #[error("refused or broken")]
    Status(#[source] Status),
    #[error("the controller did not take up the stream within {} s", OPEN_TIMEOUT.as_secs())]
    Silent,
    #[error("the controller ended the stream")]
    Ended,
    #[error("the controller does not read what it is sent")]
    Backlog,
    #[error("the control plane is not the one whose mesh was kept: all is fetched again")]
    OtherPlane,
    /// Nobody is left to tell.
    #[error("the agent is stopping")]
    Stopped,
}

impl Client {
    pub(super) fn new(
        config: DiscoveryConfig,
        incoming: mpsc::Receiver<Question>,
        snapshots: watch::Sender<Arc<Snapshot>>,
        connected: watch::Sender<bool>,
    ) -> Self {
        let mirror = Mirror::new(&config.node, config.default_trust_domain.clone());
        let (questions, outage) = (Questions::default(), Outage::default());
        Self { config, mirror, keeper: None, recalled: false, questions, incoming, snapshots, connected, outage }
    }

    /// Runs until the last handle is gone.
    pub(super) async fn run(mut self) {
        let mut backoff = Backoff::new(RECONNECT_LEAST, RECONNECT_MOST);
        loop {
            let begin = Instant::now();
            let result = self.stream().await;
            self.connected.send_replace(false);
            self.questions.abandon();
            match result {
                Err(StreamError::Stopped) => return,
                Err(error) => self.outage.lost(&error),
                Ok(never) => match never {},
            }
            if begin.elapsed() >= GOOD_STREAM {
                backoff.reset();
            }
            let rest = tokio::time::sleep(backoff.next_wait());
            if self.turning_questions_away(rest).await.is_err() {
                return;
            }
        }
    }

    /// Opens one stream and serves it to its end.
    async fn stream(&mut self) -> Result<std::convert::Infallible, StreamError> {
        let endpoint = self.config.endpoint.clone();
        let channel = self.turning_questions_away(connect(&endpoint)).await??;
        self.recall().await?;
        // In a large mesh they are large: they are made when there is somebody to read them.
        let opening = open(&endpoint, channel, self.first_requests());
        let (requests, mut responses) = self.turning_questions_away(opening).await??;
        self.outage.over();
        self.connected.send_replace(true);
        if let Some(keeper) = &self.keeper {
            keeper.connected();
        }
        let mut mesh_due = self.mirror.only_mesh_is_missing().then(|| Instant::now() + MESH_PATIENCE);
        loop {
            let wake = [mesh_due, self.questions.next_deadline()].into_iter().flatten().min();
            tokio::select! {
                message = responses.message() => match message {
                    Ok(Some(response)) => {
                        self.respond(response, &requests).await?;
                        let missing = self.mirror.only_mesh_is_missing();
                        mesh_due = missing.then(|| mesh_due.unwrap_or_else(|| Instant::now() + MESH_PATIENCE));
                    }
                    Ok(None) => return Err(StreamError::Ended),
                    Err(status) => return Err(StreamError::Status(status)),
                },
                question = self.incoming.recv() => self.ask(question.ok_or(StreamError::Stopped)?, &requests)?,
                () = at(wake) => {
                    let now = Instant::now();
                    if mesh_due.is_some_and(|due| due <= now) {
                        mesh_due = None;
                        if self.mirror.is_recalled() {
                            self.forget();
                            return Err(StreamError::OtherPlane);
                        }
                        info!(trust_domain = %self.config.default_trust_domain, "the control plane names no mesh settings, defaults hold");
                        self.mirror.assume_mesh();
                        self.publish();
                    }
                    let names = self.questions.expire(now);
                    self.unsubscribe(names, &requests)?;
                }
            }
        }
    }

    /// Takes up what a predecessor kept, once: the roots that vouch for the controller are known by now.
    async fn recall(&mut self) -> Result<(), StreamError> {
        if !std::mem::replace(&mut self.recalled, true) {
            let config = self.config.clone();
            let empty = move || Mirror::new(&config.node, config.default_trust_domain.clone());
            let place = keep::Place::of(&self.config);
            let decoding = tokio::task::spawn_blocking(move || keep::recall(place, empty));
            // Decoding does not panic; if it did, all would be fetched.
            if let Ok((mirror, keeper)) = self.turning_questions_away(decoding).await? {
                (self.mirror, self.keeper) = (mirror, keeper);
            }
        }
        self.mirror.begin_stream();
        Ok(())
    }

    /// Begins anew, with nothing that a predecessor kept.
    fn forget(&mut self) {
        self.mirror = Mirror::new(&self.config.node, self.config.default_trust_domain.clone());
        if let Some(keeper) = &self.keeper {
            keeper.forget();
        }
    }

    /// Applies a response, publishes what it makes, answers questions, acknowledges or refuses it, and has its news kept.
    async fn respond(&mut self, response: DeltaDiscoveryResponse, requests: &Requests) -> Result<(), StreamError> {
        let Some(kind) = Kind::of(&response.type_url) else {
            debug!(type_url = quote(&response.type_url), "a response of a type that was not asked for");
            return Ok(());
        };
        let (questions, first) = (&self.questions, !self.mirror.snapshot().synced());
        let applied = self.mirror.apply(kind, &response, |address| questions.is_open(address));
        let (resources, removed) = (response.resources.len(), applied.gone());
        debug!(?kind, resources, removed, "response");
        self.config.received.count(kind.word(), resources, removed, response.encoded_len());
        self.publish();
        let answered = self.questions.answer(&applied.answered, self.mirror.snapshot());
        let acknowledgement = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            error_detail: refusal(&applied.refused),
            resource_names_unsubscribe: answered,
            ..DeltaDiscoveryRequest::default()
        };
        send(requests, acknowledgement)?;
        if let Some(keeper) = &mut self.keeper {
            keeper.keep(applied.news(response), self.mirror.bytes(), first).await;
        }
        Ok(())
    }

    fn ask(&mut self, question: Question, requests: &Requests) -> Result<(), StreamError> {
        let now = Instant::now();
        let mut names = Vec::new();
        let mut next = Some(question);
        while let Some(question) = next {
            names.extend(self.questions.ask(question, self.mirror.snapshot(), now));
            next = if names.len() < BATCH { self.incoming.try_recv().ok() } else { None };
        }
        if names.is_empty() {
            return Ok(());
        }
        let subscription = DeltaDiscoveryRequest {
            type_url: Kind::Address.type_url().to_owned(),
            resource_names_subscribe: names,
            ..DeltaDiscoveryRequest::default()
        };
        send(requests, subscription)
    }

    fn unsubscribe(&self, names: Vec<String>, requests: &Requests) -> Result<(), StreamError> {
        if names.is_empty() {
            return Ok(());
        }
        let request = DeltaDiscoveryRequest {
            type_url: Kind::Address.type_url().to_owned(),
            resource_names_unsubscribe: names,
            ..DeltaDiscoveryRequest::default()
        };
        send(requests, request)
    }

    fn publish(&self) {
        self.snapshots.send_replace(Arc::clone(self.mirror.snapshot()));
    }

    /// Waits for `work`, and meanwhile tells whoever asks that there is no connection.
    async fn turning_questions_away<T>(&mut self, work: impl Future<Output = T>) -> Result<T, StreamError> {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Ok(done),
                question = self.incoming.recv() => {
                    let Question { reply, .. } = question.ok_or(StreamError::Stopped)?;
                    // Whoever asked may have gone.
                    let _gone = reply.send(Err(ResolveError::NotConnected));
                }
            }
        }
    }

    /// One wildcard subscription a type (no names: the form that every control plane knows), with what is held already.
    fn first_requests(&mut self) -> Vec<DeltaDiscoveryRequest> {
        let request = |kind: Kind| DeltaDiscoveryRequest {
            node: Some(node(&self.config.node)),
            type_url: kind.type_url().to_owned(),
            initial_resource_versions: self.mirror.tell(kind),
            ..DeltaDiscoveryRequest::default()
        };
        Kind::ALL.into_iter().map(request).collect()
    }
}

async fn connect(endpoint: &ControllerEndpoint) -> Result<Channel, StreamError> {
    endpoint.connect().await.map_err(StreamError::Connect)
}

async fn open(
    endpoint: &ControllerEndpoint,
    channel: Channel,
    first: Vec<DeltaDiscoveryRequest>,
) -> Result<(Requests, Streaming<DeltaDiscoveryResponse>), StreamError> {
    let (requests, outgoing) = mpsc::channel(BACKLOG);
    for request in first {
        send(&requests, request)?;
    }
    let request = endpoint.authorize(ReceiverStream::new(outgoing)).await.map_err(StreamError::Token)?;
    let mut client = AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(RESPONSE_LIMIT);
    match tokio::time::timeout(OPEN_TIMEOUT, client.delta_aggregated_resources(request)).await {
        Ok(Ok(response)) => Ok((requests, response.into_inner())),
        Ok(Err(status)) => Err(StreamError::Status(status)),
        Err(_elapsed) => Err(StreamError::Silent),
    }
}

/// Who asks, in the form that Istio's control plane parses: `type~address~name.namespace~domain`.
fn node(name: &str) -> Node {
    let text = |text: &str| Value { kind: Some(ValueKind::StringValue(text.to_owned())) };
    let metadata = [("NODE_NAME", name), ("NAMESPACE", "culvert-system"), ("NAME", "culvert-agent")];
    Node {
        id: format!("ztunnel~127.0.0.1~{name}.culvert-system~culvert-system.svc.cluster.local"),
        cluster: "culvert-agent".to_owned(),
        metadata: Some(Struct { fields: metadata.map(|(key, value)| (key.to_owned(), text(value))).into() }),
    }
}

fn send(requests: &Requests, request: DeltaDiscoveryRequest) -> Result<(), StreamError> {
    requests.try_send(request).map_err(|error| match error {
        mpsc::error::TrySendError::Full(_) => StreamError::Backlog,
        mpsc::error::TrySendError::Closed(_) => StreamError::Ended,
    })
}

/// Logs the resources that were refused, and words the refusal for the controller.
fn refusal(refused: &[DecodeError]) -> Option<Detail> {
    if refused.is_empty() {
        return None;
    }
    for error in refused.iter().take(REFUSED_NAMED) {
        warn!(%error, "the controller sent a resource that makes no sense, what was known before stays");
    }
    let mut message = refused.iter().take(REFUSED_NAMED).map(ToString::to_string).collect::<Vec<_>>().join("; ");
    if refused.len() > REFUSED_NAMED {
        let more = refused.len() - REFUSED_NAMED;
        warn!(more, "more such resources came with them");
        message.push_str(&format!("; and {more} more"));
    }
    Some(Detail { code: Code::InvalidArgument as i32, message })
}

async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// Says once that the controller is lost, and why; again when a person must act on another cause; and once that it is back.
#[derive(Debug, Default)]
struct Outage {
    cause: Option<String>,
    connected_before: bool,
}

impl Outage {
    fn lost(&mut self, error: &StreamError) {
        let cause = in_words(error);
        let repeats = self.cause.as_ref().is_some_and(|former| *former == cause || !needs_operator(error));
        if repeats {
            debug!(cause, "the controller is still away");
            return;
        }
        match self.connected_before {
            true => warn!(cause, "the controller is lost, the last known state of the mesh holds"),
            false => warn!(cause, "the controller cannot be reached yet"),
        }
        self.cause = Some(cause);
    }

    fn over(&mut self) {
        match (self.cause.take(), self.connected_before) {
            (Some(_), true) => info!("the controller is back"),
            (Some(_), false) | (None, _) => info!("the controller is connected"),
        }
        self.connected_before = true;
    }
}

#[cfg(test)]
mod tests;
