//! Delta xDS: one task for each stream, which tells its client what it asked for and then what changes.
//!
//! A client that reads slowly costs one message under way: what changes meanwhile is put together when it reads on.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use prost_types::Any;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, warn};

use super::Shared;
use super::authenticated::caller;
use super::quota::Quota;
use super::relief::Relief;
use super::subscription::{Item, MAX_NAMES, Subscription, TooFarBehind, TooManyNames, address_in};
use crate::controller::index::{Resource, ResourceKind};
use crate::controller::publish::MeshState;
use crate::controller::source::About;
use crate::proto::discovery::aggregated_discovery_service_server::AggregatedDiscoveryService;
use crate::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource as WireResource};

/// The response is full once it holds this many bytes of resources. For each stream that was told of a whole mesh, the buffer that its
/// largest response was written to stays.
const CHUNK_BYTES: usize = 64 * 1024;
/// What a resource takes in a response beside its name and content, about.
const RESOURCE_BYTES: usize = 128;
/// Responses under way to one client.
const UNDER_WAY: usize = 2;
/// How long a client may leave a response unread.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a stream's last word may take to be read.
const FAREWELL: Duration = Duration::from_secs(1);

/// The discovery service.
pub(super) struct Discovery {
    pub(super) shared: Shared,
    pub(super) quota: Quota,
    /// Hears of each client that has been told of everything.
    pub(super) relief: Relief,
}

/// One client's stream.
struct Conversation {
    shared: Shared,
    relief: Relief,
    states: watch::Receiver<Arc<MeshState>>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    /// The node whose token the client showed.
    node: Arc<str>,
    /// What the client calls itself.
    client: String,
    nonce: u64,
    address: Subscription,
    authorization: Subscription,
    mesh: Subscription,
}

/// Whether a response is part of a type's first full answer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Initial,
    Change,
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Discovery {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let node = caller(&request)?;
        let held = self.quota.take(&node)?;
        let (responses, receiver) = mpsc::channel(UNDER_WAY);
        let conversation = Conversation {
            states: self.shared.states.clone(),
            shared: self.shared.clone(),
            relief: self.relief.clone(),
            responses: responses.clone(),
            client: node.to_string(),
            nonce: 0,
            address: Subscription::new(ResourceKind::Address, &node),
            authorization: Subscription::new(ResourceKind::Authorization, &node),
            mesh: Subscription::new(ResourceKind::Mesh, &node),
            node,
        };
        tokio::spawn(async move {
            if let Err(status) = conversation.hold(request.into_inner()).await {
                // A client that is gone, or reads nothing, does not hear this either.
                drop(responses.send_timeout(Err(status), FAREWELL).await);
            }
            drop(held);
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

impl Conversation {
    /// Answers until the client leaves.
    async fn hold(mut self, mut requests: Streaming<DeltaDiscoveryRequest>) -> Result<(), Status> {
        let _counted = self.shared.metrics.client();
        let mut nodes = self.shared.nodes.changes();
        let stop = self.shared.stop.clone();
        self.states.mark_unchanged();
        loop {
            tokio::select! {
                request = requests.message() => match request? {
                    Some(request) => self.hear(request).await?,
                    None => return Ok(()),
                },
                changed = self.states.changed() => match changed {
                    Ok(()) => self.tell_changes().await?,
                    Err(_stopped) => return Err(Status::unavailable("the controller is stopping")),
                },
                _changed = nodes.changed() => {}
                () = stop.cancelled() => return Err(Status::unavailable("the controller is stopping")),
            }
            if !self.shared.nodes.accepts(&self.node) {
                return Err(Status::unauthenticated(format!("node {} is no longer part of the mesh", self.node)));
            }
        }
    }

    async fn hear(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        if let Some(id) = request.node.as_ref().map(|node| &node.id).filter(|id| !id.is_empty()) {
            self.client = id.chars().take(256).collect();
        }
        if let Some(error) = &request.error_detail {
            let message: String = error.message.chars().take(1024).collect();
            warn!(client = self.client, node = %self.node, type_url = request.type_url, "a client did not accept a response: {message}");
        }
        let Some(kind) = ResourceKind::of(&request.type_url) else { return self.answer_unknown(request).await };
        let new = self.subscription(kind).is_new();
        self.subscription(kind).unsubscribe(&request.resource_names_unsubscribe);
        let names = &request.resource_names_subscribe;
        let all = names.iter().any(|name| name == "*") || (new && names.is_empty());
        if all {
            let state = self.state();
            if let Some(items) = self.subscription(kind).follow_all(&state, &request.initial_resource_versions) {
                debug!(client = self.client, ?kind, items = items.len(), "sending everything that differs");
                self.send(kind.type_url(), items, Part::Initial, state.sequence()).await?;
                self.relief.wanted();
            }
        } else if new && !request.initial_resource_versions.is_empty() {
            let state = self.state();
            let items = self.subscription(kind).resume(&state, &request.initial_resource_versions).map_err(too_many)?;
            self.send(kind.type_url(), items, Part::Change, state.sequence()).await?;
        }
        if names.iter().any(|name| name != "*") {
            self.await_news_of(names).await;
            let state = self.state();
            let items = self.subscription(kind).follow(&state, names).map_err(too_many)?;
            self.send(kind.type_url(), items, Part::Change, state.sequence()).await?;
        }
        Ok(())
    }

    /// Makes sure that what was written about these names before is known.
    async fn await_news_of(&self, names: &[String]) {
        let state = self.state();
        let about = |name: &String| match address_in(name) {
            Some(address) if state.at_address(address).is_none() => About::Address(address),
            _ => About::Other,
        };
        let abouts: HashSet<About> = names.iter().filter(|name| *name != "*").map(about).collect();
        join_all(abouts.into_iter().map(|about| self.shared.barrier.pass(about))).await;
    }

    /// Types that this controller does not have are empty.
    async fn answer_unknown(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        if !request.response_nonce.is_empty() {
            return Ok(());
        }
        debug!(client = self.client, type_url = request.type_url, "a type that this controller does not have");
        let names = request.resource_names_subscribe.into_iter().filter(|name| name != "*");
        let sequence = self.states.borrow().sequence();
        self.send(&request.type_url, names.map(Item::Absent).collect(), Part::Initial, sequence).await
    }

    /// Tells what changed. Policies come before the workloads that name them, and go after those no longer do.
    async fn tell_changes(&mut self) -> Result<(), Status> {
        let state = Arc::clone(&self.states.borrow_and_update());
        let subscriptions = [&self.mesh, &self.authorization, &self.address];
        let oldest = subscriptions.into_iter().filter_map(|subscription| subscription.waits_since(&state)).min();
        let behind = |_: TooFarBehind| Status::aborted("too far behind: connect again, with initial_resource_versions");
        let mesh = self.mesh.catch_up(&state).map_err(behind)?;
        let policies = self.authorization.catch_up(&state).map_err(behind)?;
        let addresses = self.address.catch_up(&state).map_err(behind)?;
        let (new, gone): (Vec<_>, Vec<_>) = policies.into_iter().partition(|item| matches!(item, Item::Present(..)));
        let steps = [
            (ResourceKind::Mesh, mesh),
            (ResourceKind::Authorization, new),
            (ResourceKind::Address, addresses),
            (ResourceKind::Authorization, gone),
        ];
        for (kind, items) in steps {
            self.send(kind.type_url(), items, Part::Change, state.sequence()).await?;
        }
        if let Some(oldest) = oldest {
            self.shared.metrics.pushed(oldest.elapsed());
        }
        Ok(())
    }

    /// Sends items in responses of bounded size. A first answer is sent even when there is nothing in it, and all its responses
    /// but the last have the version `partial`.
    async fn send(&mut self, type_url: &str, items: Vec<Item>, part: Part, sequence: u64) -> Result<(), Status> {
        let mut items = items.into_iter().peekable();
        if part == Part::Change && items.peek().is_none() {
            return Ok(());
        }
        loop {
            let mut response = DeltaDiscoveryResponse { type_url: type_url.to_owned(), ..DeltaDiscoveryResponse::default() };
            let mut bytes = 0;
            while bytes < CHUNK_BYTES {
                match items.next() {
                    Some(Item::Present(resource, asked)) => {
                        bytes += resource.name.len() + resource.value.len() + RESOURCE_BYTES;
                        response.resources.push(wire(type_url, &resource, &self.node, asked));
                    }
                    Some(Item::Absent(name)) => {
                        bytes += name.len();
                        response.removed_resources.push(name);
                    }
                    None => break,
                }
            }
            let last = items.peek().is_none();
            self.nonce += 1;
            response.nonce = self.nonce.to_string();
            let complete = part == Part::Change || last;
            response.system_version_info = if complete { sequence.to_string() } else { "partial".to_owned() };
            match self.responses.send_timeout(Ok(response), PATIENCE).await {
                Ok(()) => {}
                Err(mpsc::error::SendTimeoutError::Closed(_)) => return Err(Status::cancelled("the client left")),
                Err(mpsc::error::SendTimeoutError::Timeout(_)) => {
                    warn!(client = self.client, node = %self.node, "a client has read nothing for {PATIENCE:?}: its stream is ended");
                    return Err(Status::deadline_exceeded("a response was not read in time"));
                }
            }
            if last {
                return Ok(());
            }
        }
    }

    fn state(&self) -> Arc<MeshState> {
        Arc::clone(&self.states.borrow())
    }

    fn subscription(&mut self, kind: ResourceKind) -> &mut Subscription {
        match kind {
            ResourceKind::Address => &mut self.address,
            ResourceKind::Authorization => &mut self.authorization,
            ResourceKind::Mesh => &mut self.mesh,
        }
    }
}

fn too_many(_: TooManyNames) -> Status {
    Status::resource_exhausted(format!("more than {MAX_NAMES} names: subscribe to `*` instead"))
}

fn wire(type_url: &str, resource: &Resource, node: &str, asked: Option<String>) -> WireResource {
    let mut aliases: Vec<_> = resource.addresses.iter().map(|address| format!("/{address}")).collect();
    aliases.extend(asked.filter(|asked| !aliases.contains(asked)));
    WireResource {
        version: resource.version.to_string(),
        resource: Some(Any { type_url: type_url.to_owned(), value: resource.value_for(node) }),
        name: resource.name.to_string(),
        aliases,
    }
}
