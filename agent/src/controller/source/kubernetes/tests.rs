use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::Cluster;
use crate::controller::index::tests::settings;
use crate::controller::index::{Finding, Index, ResourceKind};
use crate::controller::kubernetes::test_server::ApiServer;
use crate::controller::source::manifests::objects;
use crate::controller::source::{About, Change, Feed, Source};
use crate::observe::ControllerMetrics;

/// One of everything, as an API server has it.
const SHOP: &str = "
apiVersion: v1
kind: Node
metadata: {name: node-a}
spec: {podCIDR: 10.1.0.0/24, podCIDRs: [10.1.0.0/24, 'fd00:1::/64'], taints: [{key: a, effect: NoSchedule}]}
status: {nodeInfo: {kernelVersion: '6.1'}}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {culvert.dev/mesh: enabled}}
status: {phase: Active}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: web, namespace: shop}
secrets: [{name: web-token}]
---
apiVersion: v1
kind: Pod
metadata:
  name: web-7d4f-x2
  namespace: shop
  labels: {app: web, pod-template-hash: 7d4f}
  annotations: {long: text}
  creationTimestamp: '2024-01-01T00:00:00Z'
  ownerReferences: [{apiVersion: apps/v1, kind: ReplicaSet, name: web-7d4f, uid: u, controller: true}]
  managedFields: [{manager: kubelet, operation: Update, apiVersion: v1, fieldsType: FieldsV1, fieldsV1: {'f:status': {}}}]
spec:
  nodeName: node-a
  serviceAccountName: web
  volumes: [{name: token, projected: {sources: [{serviceAccountToken: {path: token}}]}}]
  initContainers: [{name: first, image: i}]
  containers:
  - {name: web, image: i, env: [{name: A, value: b}], ports: [{name: http, containerPort: 8080}]}
  - {name: side, image: i, ports: [{containerPort: 9090}]}
status:
  phase: Running
  podIP: 10.1.0.2
  podIPs: [{ip: 10.1.0.2}, {ip: 'fd00:1::2'}]
  conditions: [{type: Initialized, status: 'True'}, {type: Ready, status: 'True'}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.0.9, clusterIPs: [10.96.0.9], selector: {app: web}, ports: [{name: http, port: 80, targetPort: http}]}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: shop}
spec: {mtls: {mode: STRICT}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: cart-only, namespace: shop, annotations: {culvert.dev/dry-run: 'true', other: x}}
spec:
  selector: {matchLabels: {app: web}}
  rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/cart]}}]}]
";

const SLICE: &str = "
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web, other: x}}
addressType: IPv4
endpoints:
- addresses: [10.1.0.2]
  conditions: {ready: true, serving: true}
  targetRef: {kind: Pod, name: web-7d4f-x2, namespace: shop, uid: u}
  nodeName: node-a
ports: [{name: http, port: 8080, protocol: TCP}]
";

/// A followed server, the index behind it, and what it has said so far.
struct World {
    server: ApiServer,
    feed: Feed,
    index: Index,
    resources: Resources,
    /// Every change that arrived, in words.
    changes: Vec<String>,
    findings: Vec<Finding>,
    _stop: tokio_util::sync::DropGuard,
}

type Resources = BTreeMap<(ResourceKind, String), Vec<u8>>;

fn pod(name: &str, ip: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{nodeName: node-a, containers: []}}\nstatus: {{podIP: {ip}, phase: Running}}\n"
    )
}

fn apply(index: &mut Index, changes: &[Change], resources: &mut Resources) -> Vec<Finding> {
    let update = index.apply(changes);
    for (kind, name, resource) in update.resources {
        match resource {
            Some(resource) => drop(resources.insert((kind, name.to_string()), resource.value)),
            None => drop(resources.remove(&(kind, name.to_string()))),
        }
    }
    update.findings
}

impl World {
    /// Follows a server until all that it has is known.
    async fn start(server: ApiServer) -> Self {
        let stop = CancellationToken::new();
        let cluster = Cluster::new(server.client(), settings("cluster.local").context(), ControllerMetrics::new());
        let Ok(feed) = cluster.start(stop.clone());
        let mut world = Self {
            server,
            feed,
            index: Index::new(settings("cluster.local")),
            resources: BTreeMap::new(),
            changes: Vec::new(),
            findings: Vec::new(),
            _stop: stop.drop_guard(),
        };
        while !world.step().await {}
        world
    }

    /// Applies one batch. Gives whether it was complete.
    async fn step(&mut self) -> bool {
        let batch = timeout(Duration::from_secs(3600), self.feed.batches.recv()).await.expect("news in time");
        let batch = batch.expect("the feed goes on");
        self.changes.extend(batch.changes.iter().map(|change| match change {
            Change::Applied { object, .. } => format!("applied {}", object.key()),
            Change::Removed(key) => format!("removed {key}"),
            Change::Refused { key, error, .. } => format!("refused {key}: {error}"),
        }));
        self.findings.extend(apply(&mut self.index, &batch.changes, &mut self.resources));
        let complete = batch.complete;
        batch.passed();
        complete
    }

    /// What was said last of the parts of a policy that do not do what it says.
    fn said_of(&self, policy: &str) -> Vec<String> {
        let finding = self.findings.iter().rfind(|finding| finding.policy.to_string() == policy).expect("it was told of");
        finding.problems.clone().expect("it is there")
    }

    /// Applies batches until this was said.
    async fn hears(&mut self, change: &str) {
        while !self.changes.iter().any(|heard| heard.starts_with(change)) {
            self.step().await;
        }
    }

    fn has_pod(&self, name: &str) -> bool {
        self.resources.contains_key(&(ResourceKind::Address, format!("Kubernetes//Pod/shop/{name}")))
    }
}

/// What the same manifests lead to without an API server.
fn by_manifests(text: &str) -> Resources {
    let (mut index, mut resources) = (Index::new(settings("cluster.local")), Resources::new());
    let changes: Vec<_> = objects(text, &settings("cluster.local").context())
        .into_iter()
        .map(|object| Change::Applied { object: Arc::new(object), origin: "test".into() })
        .collect();
    apply(&mut index, &changes, &mut resources);
    resources
}

#[tokio::test(start_paused = true)]
async fn a_cluster_gives_the_same_mesh_as_its_manifests() {
    let whole = format!("{SHOP}---{SLICE}");
    for policies in ["v1", "v1beta1"] {
        let server = ApiServer::with(&whole);
        server.offer_policies(policies);
        let world = World::start(server).await;
        assert_eq!(world.resources, by_manifests(&whole), "{policies}");
        assert_eq!(world.changes.len(), 8, "{:?}", world.changes);
    }
}

#[tokio::test(start_paused = true)]
async fn the_older_version_of_slices_is_read_where_there_is_no_other() {
    let server = ApiServer::with(&format!("{SHOP}---{}", SLICE.replace("nodeName: node-a", "topology: {zone: z}")));
    server.offer_policies("v1");
    server.withdraw("discovery.k8s.io", "v1");
    let world = World::start(server).await;
    assert_eq!(world.resources, by_manifests(&format!("{SHOP}---{SLICE}")));
    assert!(world.server.requests("GET /apis/discovery.k8s.io/v1beta1/endpointslices") > 0);
}

#[tokio::test(start_paused = true)]
async fn a_long_list_is_read_in_pages_and_begun_anew_when_the_server_forgets_it() {
    let pods: String = (1..=25).map(|number| pod(&format!("pod-{number:02}"), &format!("10.1.0.{number}"))).collect();
    let server = ApiServer::with(&pods);
    server.set_page(10);
    server.fail_next_page(410);
    let world = World::start(server).await;
    assert_eq!((1..=25).filter(|number| world.has_pod(&format!("pod-{number:02}"))).count(), 25);
    assert_eq!(world.changes.iter().filter(|change| change.contains("Pod")).count(), 25, "each is told once");
    assert_eq!(world.server.requests("GET /api/v1/pods?limit"), 5);
}

#[tokio::test(start_paused = true)]
async fn changes_are_told_as_they_come() {
    let mut world = World::start(ApiServer::with(SHOP)).await;
    world.server.put(&pod("db", "10.1.0.3"));
    world.hears("applied Pod shop/db").await;
    assert!(world.has_pod("db"));
    world.server.delete("", "pods", "shop", "db");
    world.hears("removed Pod shop/db").await;
    assert!(!world.has_pod("db") && world.has_pod("web-7d4f-x2"));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_forgets_is_listed_again_and_only_differences_are_told() {
    let server = ApiServer::with(&(pod("stays", "10.1.0.1") + &pod("goes", "10.1.0.2") + &pod("changes", "10.1.0.3")));
    let mut world = World::start(server).await;
    world.changes.clear();
    world.server.set_down(true);
    world.server.delete("", "pods", "shop", "goes");
    world.server.put(&pod("changes", "10.1.0.33"));
    world.server.put(&pod("comes", "10.1.0.4"));
    world.server.forget();
    world.server.set_down(false);
    world.hears("removed Pod shop/goes").await;
    world.changes.sort();
    assert_eq!(world.changes, ["applied Pod shop/changes", "applied Pod shop/comes", "removed Pod shop/goes"]);
    assert!(world.has_pod("stays"));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_down_changes_nothing_and_what_happened_meanwhile_is_told_once_it_is_back() {
    let mut world = World::start(ApiServer::with(SHOP)).await;
    let before = world.resources.clone();
    world.changes.clear();
    world.server.set_down(true);
    assert!(timeout(Duration::from_secs(600), world.step()).await.is_err(), "{:?}", world.changes);
    assert_eq!(world.resources, before);
    world.server.put(&pod("db", "10.1.0.3"));
    world.server.set_down(false);
    world.hears("applied Pod shop/db").await;
    assert_eq!(world.changes, ["applied Pod shop/db"], "the watch goes on where it was");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_down_at_the_start_is_waited_for() {
    let server = ApiServer::with(SHOP);
    server.set_down(true);
    let later = server.clone();
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(60)).await;
        later.set_down(false);
    });
    assert!(World::start(server).await.has_pod("web-7d4f-x2"));
}

#[tokio::test(start_paused = true)]
async fn policies_are_taken_up_when_their_definitions_come_and_dropped_when_they_go() {
    let mut world = World::start(ApiServer::with(SHOP)).await;
    let policy = (ResourceKind::Authorization, "shop/cart-only".to_owned());
    assert!(world.has_pod("web-7d4f-x2") && !world.resources.contains_key(&policy));
    world.server.offer_policies("v1beta1");
    world.hears("applied AuthorizationPolicy shop/cart-only").await;
    world.hears("applied PeerAuthentication shop/default").await;
    assert!(world.resources.contains_key(&policy));
    world.server.withdraw("security.istio.io", "v1beta1");
    world.hears("removed AuthorizationPolicy shop/cart-only").await;
    assert!(!world.resources.contains_key(&policy));
}

#[tokio::test(start_paused = true)]
async fn a_definition_that_changes_its_version_changes_no_policy() {
    let server = ApiServer::with(SHOP);
    server.offer_policies("v1beta1");
    let mut world = World::start(server).await;
    world.changes.clear();
    world.server.offer_policies("v1");
    world.server.withdraw("security.istio.io", "v1beta1");
    world.server.put(&SHOP.replace("STRICT", "PERMISSIVE"));
    world.hears("applied PeerAuthentication shop/default").await;
    assert!(!world.changes.iter().any(|change| change.starts_with("removed")), "{:?}", world.changes);
}

#[tokio::test(start_paused = true)]
async fn an_object_that_cannot_be_used_is_told_of_and_what_it_said_before_stays() {
    let server = ApiServer::with(SHOP);
    server.offer_policies("v1");
    let mut world = World::start(server).await;
    let before = world.resources.clone();
    world.server.put(&SHOP.replace("principals:", "principal:"));
    world.hears("refused AuthorizationPolicy shop/cart-only: spec.rules[0].from[0].source").await;
    assert_eq!(world.resources, before);
    let finding = world.findings.last().unwrap();
    let problem = &finding.problems.as_ref().unwrap()[0];
    assert!(problem.contains("principal") && problem.ends_with("what the object said before stays in force"), "{problem}");
    assert!(finding.uid.is_some());
}

#[tokio::test(start_paused = true)]
async fn a_policy_that_never_made_sense_closes_what_it_may_close_until_it_is_put_right() {
    let server = ApiServer::with(&SHOP.replace("principals:", "principal:").replace("STRICT", "STRICTLY"));
    server.offer_policies("v1");
    let mut world = World::start(server).await;
    let (mode, rule) = ("what it selects takes mutual TLS only", "it allows nobody");
    for (policy, effect) in [("PeerAuthentication shop/default", mode), ("AuthorizationPolicy shop/cart-only", rule)] {
        let problems = world.said_of(policy);
        assert!(matches!(&problems[..], [problem] if problem.contains(effect)), "{problems:?}");
    }
    let mut standing_in = world.resources.clone();
    world.changes.clear();
    world.server.put(SHOP);
    world.hears("applied AuthorizationPolicy shop/cart-only").await;
    world.hears("applied PeerAuthentication shop/default").await;
    let mut good = world.resources.clone();
    let policy = (ResourceKind::Authorization, "shop/cart-only".to_owned());
    let [stand_in, rule] = [&mut standing_in, &mut good].map(|resources| resources.remove(&policy).expect("a policy"));
    assert!(stand_in.len() < rule.len(), "it has no rules: {stand_in:?}");
    assert_eq!(standing_in, good, "STRICT is what both say");

    world.changes.clear();
    world.server.put(&SHOP.replace("STRICT", "STRICTLY"));
    world.hears("refused PeerAuthentication shop/default").await;
    let said = world.said_of("PeerAuthentication shop/default").concat();
    assert!(said.ends_with("what the object said before stays in force"), "{said}");
}

#[tokio::test(start_paused = true)]
async fn what_is_asked_about_is_looked_up_when_the_watch_is_behind() {
    let mut world = World::start(ApiServer::with(SHOP)).await;
    world.server.hold_watches(true);
    let barrier = world.feed.barrier.clone();
    let ask = |about: About| {
        let barrier = barrier.clone();
        tokio::spawn(async move { barrier.pass(about).await })
    };
    for (name, ip, about) in [
        ("db", "10.1.0.3", About::Address("10.1.0.3".parse().unwrap())),
        ("cache", "10.1.0.4", About::Pods { namespace: "shop".to_owned(), node: "node-a".to_owned() }),
    ] {
        world.server.put(&pod(name, ip));
        let passed = ask(about);
        world.hears(&format!("applied Pod shop/{name}")).await;
        assert!(passed.await.unwrap() && world.has_pod(name));
    }
    world.changes.clear();
    world.server.hold_watches(false);
    world.server.put(&pod("last", "10.1.0.5"));
    world.hears("applied Pod shop/last").await;
    assert_eq!(world.changes, ["applied Pod shop/last"], "what was looked up is not told again");
    world.server.set_down(true);
    let passed = ask(About::Address("10.1.0.99".parse().unwrap()));
    assert!(!passed.await.unwrap(), "a look-up that failed assures nothing");
}
