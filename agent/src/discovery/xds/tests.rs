//! The client against a control plane in this process, over real TLS on loopback.

use std::net::IpAddr;
use std::pin::Pin;

use tokio_stream::Stream;
use tonic::service::Routes;
use tonic::{Request, Response};

use super::super::fixture::{mesh_resource, pod, pod_resource, response, uid};
use super::super::{Discovery, DiscoveryHandle};
use super::*;
use crate::identity::test_authority::TestAuthority;
use crate::identity::test_server::{TestServer, authenticate};
use crate::observe::XdsReceived;
use crate::proto::discovery::Resource;
use crate::proto::discovery::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use crate::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE, MESH_TYPE};

const PATIENCE: Duration = Duration::from_secs(10);

#[tokio::test]
async fn the_initial_state_then_changes_and_removals_arrive_as_snapshots() {
    let mut plane = ControlPlane::start().await;
    let handle = plane.client();
    let mut stream = plane.stream().await;
    for kind in Kind::ALL {
        let request = stream.request().await;
        assert_eq!((request.type_url, request.response_nonce.is_empty()), (kind.type_url().to_owned(), true));
        assert!(request.resource_names_subscribe.is_empty() && request.node.is_some());
    }
    stream.send(MESH_TYPE, vec![mesh_resource("td", &["10.0.0.0/8"])], &[]).await;
    stream.send(AUTHORIZATION_TYPE, vec![], &[]).await;
    stream.send(ADDRESS_TYPE, vec![pod_resource(pod("a", [10, 0, 0, 1]))], &[]).await;
    for _ in Kind::ALL {
        let acknowledgement = stream.request().await;
        assert_eq!((acknowledgement.response_nonce.as_str(), acknowledgement.error_detail), ("nonce", None));
    }
    let mut snapshots = handle.snapshots();
    let snapshot = until(&mut snapshots, Snapshot::synced).await;
    assert_eq!(snapshot.workload(&uid("a")).expect("known").identity.trust_domain().as_str(), "td");
    stream.send(ADDRESS_TYPE, vec![pod_resource(pod("b", [10, 0, 0, 2]))], &[&uid("a")]).await;
    let snapshot = until(&mut snapshots, |snapshot| snapshot.workload(&uid("b")).is_some()).await;
    assert!(snapshot.workload(&uid("a")).is_none() && snapshot.synced());
}

#[tokio::test]
async fn a_bad_resource_is_refused_by_name_and_field() {
    let mut plane = ControlPlane::start().await;
    let handle = plane.client();
    let mut stream = plane.synced_stream(&handle).await;
    let bad = crate::proto::workload::Workload { status: 9, ..pod("a", [10, 0, 0, 1]) };
    stream.send(ADDRESS_TYPE, vec![pod_resource(bad)], &[]).await;
    let refusal = stream.request().await;
    assert_eq!(refusal.response_nonce, "nonce");
    let message = refusal.error_detail.expect("refused").message;
    assert!(message.contains(&uid("a")) && message.contains("`status`"), "{message}");
    assert!(handle.snapshots().borrow().workload(&uid("a")).is_some(), "the last good state stays");
}

#[tokio::test]
async fn after_a_reconnect_the_client_tells_what_it_holds_and_keeps_it_meanwhile() {
    let mut plane = ControlPlane::start().await;
    let handle = plane.client();
    let stream = plane.synced_stream(&handle).await;
    drop(stream);
    let mut connected = handle.connected();
    connected.wait_for(|connected| !connected).await.expect("alive");
    assert!(handle.snapshots().borrow().workload(&uid("a")).is_some());
    let mut stream = plane.stream().await;
    for kind in Kind::ALL {
        let request = stream.request().await;
        let names: Vec<_> = request.initial_resource_versions.into_iter().collect();
        match kind {
            Kind::Mesh => assert_eq!(names, [("mesh".to_owned(), "1".to_owned())]),
            Kind::Authorization => assert!(names.is_empty()),
            Kind::Address => assert_eq!(names, [(uid("a"), "1".to_owned())]),
        }
    }
    stream.send(ADDRESS_TYPE, vec![], &[&uid("a")]).await;
    let snapshot = until(&mut handle.snapshots(), |snapshot| snapshot.workload(&uid("a")).is_none()).await;
    assert!(snapshot.synced());
}

#[tokio::test]
async fn a_client_that_starts_again_tells_what_its_predecessor_held_and_acts_on_it_when_that_is_confirmed() {
    let mut plane = ControlPlane::start().await;
    let handle = plane.restarted_client().await;
    let mut stream = plane.stream().await;
    let told = [("mesh", Kind::Mesh), (&uid("a"), Kind::Address)];
    for kind in Kind::ALL {
        let names: Vec<_> = stream.request().await.initial_resource_versions.into_iter().collect();
        let expected = told.iter().filter(|(_, of)| *of == kind).map(|(name, _)| ((*name).to_owned(), "1".to_owned()));
        assert_eq!(names, expected.collect::<Vec<_>>());
    }
    stream.send(MESH_TYPE, vec![], &[]).await;
    stream.send(AUTHORIZATION_TYPE, vec![], &[]).await;
    for _ in 0..2 {
        stream.request().await;
    }
    assert!(handle.snapshots().borrow().workloads().next().is_none(), "addresses are not confirmed yet");
    stream.send(ADDRESS_TYPE, vec![pod_resource(pod("b", [10, 0, 0, 2]))], &[&uid("a")]).await;
    let snapshot = until(&mut handle.snapshots(), Snapshot::synced).await;
    assert!(snapshot.workload(&uid("a")).is_none() && snapshot.workload(&uid("b")).is_some());
    assert_eq!(snapshot.trust_domain().map(ToString::to_string).as_deref(), Some("td"));
}

#[tokio::test]
async fn what_was_kept_is_forgotten_where_another_control_plane_answers() {
    let mut plane = ControlPlane::start().await;
    let handle = plane.restarted_client().await;
    let stream = plane.stream().await;
    // It has no mesh settings, and says nothing of what it does not know.
    stream.send(AUTHORIZATION_TYPE, vec![], &[]).await;
    stream.send(ADDRESS_TYPE, vec![pod_resource(pod("b", [10, 0, 0, 2]))], &[]).await;
    let mut next = plane.stream().await;
    assert!(handle.snapshots().borrow().workloads().next().is_none());
    for _ in Kind::ALL {
        assert!(next.request().await.initial_resource_versions.is_empty());
    }
    next.send(AUTHORIZATION_TYPE, vec![], &[]).await;
    next.send(ADDRESS_TYPE, vec![pod_resource(pod("b", [10, 0, 0, 2]))], &[]).await;
    let snapshot = until(&mut handle.snapshots(), Snapshot::synced).await;
    assert!(snapshot.workload(&uid("a")).is_none() && snapshot.workload(&uid("b")).is_some());
}

#[tokio::test]
async fn a_control_plane_that_names_no_mesh_is_taken_with_defaults_after_two_seconds() {
    let mut plane = ControlPlane::start().await;
    let handle = plane.client();
    let stream = plane.stream().await;
    stream.send(AUTHORIZATION_TYPE, vec![], &[]).await;
    let begin = Instant::now();
    stream.send(ADDRESS_TYPE, vec![pod_resource(pod("a", [10, 0, 0, 1]))], &[]).await;
    let snapshot = until(&mut handle.snapshots(), Snapshot::synced).await;
    assert!(begin.elapsed() >= MESH_PATIENCE);
    assert_eq!(snapshot.trust_domain().map(ToString::to_string).as_deref(), Some("cluster.local"));
    assert!(snapshot.cluster_ranges().is_empty() && !snapshot.default_deny());
}

#[tokio::test]
async fn an_unknown_address_is_asked_about_once_and_the_answer_unsubscribed() {
    let mut plane = ControlPlane::start().await;
    let handle = plane.client();
    let mut stream = plane.synced_stream(&handle).await;
    let address = IpAddr::from([10, 0, 0, 2]);
    let asks = tokio::spawn({
        let handle = handle.clone();
        async move { tokio::join!(handle.resolve(address), handle.resolve(address)) }
    });
    let request = stream.request().await;
    assert_eq!(request.resource_names_subscribe, ["/10.0.0.2"]);
    stream.send(ADDRESS_TYPE, vec![pod_resource(pod("b", [10, 0, 0, 2]))], &[]).await;
    let (one, other) = asks.await.expect("no panic");
    assert!(one.expect("answered").workload_at(address).is_some() && other.is_ok());
    let acknowledgement = stream.request().await;
    assert_eq!(acknowledgement.resource_names_unsubscribe, ["/10.0.0.2"]);
    assert!(acknowledgement.resource_names_subscribe.is_empty(), "the second question went with the first");
}

#[tokio::test]
async fn an_absent_address_is_certain_only_by_the_controllers_word() {
    let mut plane = ControlPlane::start().await;
    let handle = plane.client();
    let mut stream = plane.synced_stream(&handle).await;
    let address = IpAddr::from([10, 0, 0, 9]);
    let ask = || {
        let handle = handle.clone();
        tokio::spawn(async move { handle.resolve(address).await })
    };
    let asked = ask();
    assert_eq!(stream.request().await.resource_names_subscribe, ["/10.0.0.9"]);
    stream.send(ADDRESS_TYPE, vec![], &["/10.0.0.9"]).await;
    assert!(asked.await.expect("no panic").expect("answered").workload_at(address).is_none());
    assert_eq!(stream.request().await.resource_names_unsubscribe, ["/10.0.0.9"]);
    let again = ask();
    assert_eq!(stream.request().await.resource_names_subscribe, ["/10.0.0.9"], "it is asked again: the answer was for then");
    stream.send(ADDRESS_TYPE, vec![], &["/10.0.0.9"]).await;
    assert!(again.await.expect("no panic").is_ok());
    assert_eq!(stream.request().await.resource_names_unsubscribe, ["/10.0.0.9"]);
    let silent = IpAddr::from([10, 0, 0, 10]);
    assert_eq!(handle.resolve(silent).await.expect_err("no answer"), ResolveError::Timeout);
    assert_eq!(stream.request().await.resource_names_subscribe, ["/10.0.0.10"]);
    assert_eq!(stream.request().await.resource_names_unsubscribe, ["/10.0.0.10"]);
    let last = ask();
    assert_eq!(stream.request().await.resource_names_subscribe, ["/10.0.0.9"]);
    drop(stream);
    assert_eq!(last.await.expect("no panic").expect_err("lost"), ResolveError::NotConnected);
    handle.connected().wait_for(|connected| !connected).await.expect("alive");
    assert_eq!(handle.resolve(silent).await.expect_err("lost"), ResolveError::NotConnected);
    assert!(handle.resolve(IpAddr::from([10, 0, 0, 1])).await.is_ok(), "what is held needs no controller");
}

#[tokio::test]
async fn the_cause_of_a_lost_controller_is_told_in_words() {
    let mut plane = ControlPlane::start().await;
    let words = |error: StreamError| in_words(&error);
    let open = |endpoint: ControllerEndpoint| async move {
        let opened = async { super::open(&endpoint, connect(&endpoint).await?, Vec::new()).await };
        opened.await.map(drop).expect_err("refused")
    };
    let root = plane.server.directory.path().join("other-root.pem");
    std::fs::write(&root, TestAuthority::new("other").root_pem()).expect("written");
    let error = open(plane.server.endpoint_with(&root, &plane.server.token)).await;
    assert!(needs_operator(&error));
    let text = words(error);
    assert!(text.contains("does not verify against") && text.contains("other-root.pem"), "{text}");
    let missing = plane.server.directory.path().join("missing");
    let text = words(open(plane.server.endpoint_with(&missing, &plane.server.token)).await);
    assert!(text.contains("cannot read the root certificate file") && text.contains("missing"), "{text}");
    let text = words(open(plane.server.endpoint_with(&plane.server.root, &missing)).await);
    assert!(text.contains("cannot read the token file"), "{text}");
    std::fs::write(&plane.server.token, "wrong\n").expect("written");
    let error = open(plane.server.endpoint()).await;
    assert!(needs_operator(&error));
    assert_eq!(words(error), "the controller refused the token: no such token");
    plane.server.stop().await;
    let error = open(plane.server.endpoint()).await;
    assert!(!needs_operator(&error));
    let text = words(error);
    assert!(text.contains("connection refused"), "{text}");
}

#[tokio::test]
async fn a_client_that_starts_before_its_files_connects_once_they_are_there() {
    let mut plane = ControlPlane::start().await;
    let pem = std::fs::read(&plane.server.root).expect("written");
    std::fs::remove_file(&plane.server.root).expect("removed");
    let handle = plane.client();
    tokio::task::yield_now().await;
    std::fs::write(&plane.server.root, pem).expect("written");
    plane.stream().await;
    handle.connected().wait_for(|connected| *connected).await.expect("alive");
}

async fn until(snapshots: &mut watch::Receiver<Arc<Snapshot>>, holds: impl Fn(&Snapshot) -> bool) -> Arc<Snapshot> {
    let found = tokio::time::timeout(PATIENCE, snapshots.wait_for(|snapshot| holds(snapshot))).await;
    Arc::clone(&found.expect("in time").expect("alive"))
}

/// A control plane whose streams the test speaks on itself.
struct ControlPlane {
    streams: mpsc::Receiver<ServedStream>,
    server: TestServer,
}

struct ServedStream {
    requests: Streaming<DeltaDiscoveryRequest>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
}

struct Service(mpsc::Sender<ServedStream>);

impl ControlPlane {
    async fn start() -> Self {
        let (streams_in, streams) = mpsc::channel(8);
        let services = Routes::new(AggregatedDiscoveryServiceServer::new(Service(streams_in)));
        Self { streams, server: TestServer::start(services).await }
    }

    fn client(&self) -> DiscoveryHandle {
        Discovery::start(DiscoveryConfig {
            endpoint: self.server.endpoint(),
            node: "node".into(),
            default_trust_domain: "cluster.local".parse().expect("legal"),
            state_dir: self.server.directory.path().join("state"),
            received: XdsReceived::default(),
        })
    }

    /// A client whose predecessor has kept what it held.
    async fn restarted_client(&mut self) -> DiscoveryHandle {
        let predecessor = self.client();
        drop(self.synced_stream(&predecessor).await);
        drop(predecessor);
        self.kept(&uid("a")).await;
        self.client()
    }

    /// Waits until what is kept names this resource.
    async fn kept(&self, name: &str) {
        let file = self.server.directory.path().join("state/node.mesh");
        let named = || std::fs::read(&file).is_ok_and(|bytes| bytes.windows(name.len()).any(|part| part == name.as_bytes()));
        let looked = async {
            while !named() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, looked).await.expect("in time");
    }

    async fn stream(&mut self) -> ServedStream {
        tokio::time::timeout(PATIENCE, self.streams.recv()).await.expect("in time").expect("alive")
    }

    /// A stream on which the initial state, with pod `a` at 10.0.0.1, is sent and acknowledged.
    async fn synced_stream(&mut self, handle: &DiscoveryHandle) -> ServedStream {
        let mut stream = self.stream().await;
        stream.send(MESH_TYPE, vec![mesh_resource("td", &["10.0.0.0/8"])], &[]).await;
        stream.send(AUTHORIZATION_TYPE, vec![], &[]).await;
        stream.send(ADDRESS_TYPE, vec![pod_resource(pod("a", [10, 0, 0, 1]))], &[]).await;
        for _ in 0..2 * Kind::ALL.len() {
            stream.request().await;
        }
        until(&mut handle.snapshots(), Snapshot::synced).await;
        stream
    }
}

impl ServedStream {
    async fn request(&mut self) -> DeltaDiscoveryRequest {
        let message = tokio::time::timeout(PATIENCE, self.requests.message()).await.expect("in time");
        message.expect("in order").expect("open")
    }

    async fn send(&self, type_url: &str, resources: Vec<Resource>, removed: &[&str]) {
        self.responses.send(Ok(response(type_url, resources, removed))).await.expect("open");
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Service {
    type DeltaAggregatedResourcesStream = Pin<Box<dyn Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        authenticate(&request)?;
        let (responses, outgoing) = mpsc::channel(8);
        let stream = ServedStream { requests: request.into_inner(), responses };
        self.0.send(stream).await.map_err(|_gone| Status::unavailable("the test is over"))?;
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}
