mod conflicts;
mod enrolment;
mod increments;
mod policies;
mod same_node;
mod services;

use std::collections::BTreeMap;
use std::sync::Arc;

use prost::Message;

use super::{Index, MeshSettings, Resource, ResourceKind, Update};
use crate::controller::source::manifests::objects;
use crate::controller::source::{Change, Kind, ObjectKey};
use crate::model::SameNode;
use crate::proto::workload::{Address, Service, TunnelProtocol, Workload, WorkloadStatus, address};

/// Settings as they are without any flag, but for the trust domain.
pub(in crate::controller) fn settings(trust_domain: &str) -> MeshSettings {
    MeshSettings {
        trust_domain: trust_domain.parse().unwrap(),
        root_namespace: "istio-system".to_owned(),
        cluster_domain: "cluster.local".to_owned(),
        default_deny: false,
        same_node: SameNode::Kernel,
        cluster_ranges: Vec::new(),
        excluded_namespaces: [].into(),
        namespaces_told: false,
    }
}

/// An index, and what it has said so far.
pub(in crate::controller) struct World {
    index: Index,
    pub(in crate::controller) resources: BTreeMap<(ResourceKind, String), Resource>,
    warnings: Vec<String>,
    update: Update,
}

impl World {
    fn new(manifests: &str) -> Self {
        Self::of("cluster.local", manifests)
    }

    pub(in crate::controller) fn of(trust_domain: &str, manifests: &str) -> Self {
        Self::with(settings(trust_domain), manifests)
    }

    fn with_way(same_node: SameNode, manifests: &str) -> Self {
        Self::with(MeshSettings { same_node, ..settings("cluster.local") }, manifests)
    }

    fn with(settings: MeshSettings, manifests: &str) -> Self {
        let index = Index::new(settings);
        let mut world = Self { index, resources: BTreeMap::new(), warnings: Vec::new(), update: Update::default() };
        world.apply(manifests);
        world
    }

    /// Applies all objects of a text in one batch.
    fn apply(&mut self, manifests: &str) {
        let objects = objects(manifests, &self.index.settings.context());
        let changes = objects.into_iter().map(|object| Change::Applied { object: Arc::new(object), origin: "test".into() });
        self.change(&changes.collect::<Vec<_>>());
    }

    fn remove(&mut self, kind: Kind, namespace: &str, name: &str) {
        self.change(&[Change::Removed(ObjectKey { kind, namespace: namespace.to_owned(), name: name.to_owned() })]);
    }

    fn change(&mut self, changes: &[Change]) {
        self.update = self.index.apply(changes);
        self.warnings.append(&mut self.update.warnings);
        for (kind, name, resource) in &self.update.resources {
            let key = (*kind, name.to_string());
            match resource {
                Some(resource) => drop(self.resources.insert(key, resource.clone())),
                None => drop(self.resources.remove(&key)),
            }
        }
    }

    fn find_pod(&self, namespace: &str, name: &str) -> Option<Workload> {
        let resource = self.resources.get(&(ResourceKind::Address, format!("Kubernetes//Pod/{namespace}/{name}")))?;
        match Address::decode(&*resource.value).unwrap().r#type.unwrap() {
            address::Type::Workload(workload) => Some(workload),
            address::Type::Service(_) => panic!("a pod's key names a service"),
        }
    }

    /// The workload of a pod in namespace `shop`.
    fn pod(&self, name: &str) -> Workload {
        self.find_pod("shop", name).unwrap_or_else(|| panic!("{name} is served"))
    }

    fn find_service(&self, name: &str) -> Option<Service> {
        let resource = self.resources.get(&(ResourceKind::Address, format!("shop/{name}.shop.svc.cluster.local")))?;
        match Address::decode(&*resource.value).unwrap().r#type.unwrap() {
            address::Type::Service(service) => Some(service),
            address::Type::Workload(_) => panic!("a service's key names a pod"),
        }
    }

    fn enrolled(&self, name: &str) -> bool {
        self.pod(name).tunnel_protocol() == TunnelProtocol::Hbone
    }

    fn healthy(&self, name: &str) -> bool {
        self.pod(name).status() == WorkloadStatus::Healthy
    }

    /// Service port and target port of each port that the pod serves for a service of namespace `shop`.
    fn ports(&self, pod: &str, service: &str) -> Option<Vec<(u32, u32)>> {
        let pod = self.pod(pod);
        let ports = pod.services.get(&format!("shop/{service}.shop.svc.cluster.local"))?;
        Some(ports.ports.iter().map(|port| (port.service_port, port.target_port)).collect())
    }

    /// The names in the last update.
    fn touched(&self) -> Vec<String> {
        self.update.resources.iter().map(|(_, name, _)| name.to_string()).collect()
    }
}

/// A pod of namespace `shop` with more fields of its metadata, spec and status.
fn pod_with(name: &str, ip: &str, metadata: &str, spec: &str, status: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop{metadata}}}\n\
         spec: {{nodeName: node-a, containers: []{spec}}}\nstatus: {{podIP: '{ip}'{status}}}\n"
    )
}

/// A pod of namespace `shop` with the label `app` of its own name.
fn pod(name: &str, ip: &str) -> String {
    pod_with(name, ip, &format!(", labels: {{app: {name}}}"), "", "")
}

#[test]
fn a_workload_says_what_its_pod_says() {
    let world = World::new(&pod_with(
        "web-7d4f-x2",
        "10.1.0.2",
        ", labels: {app: a, app.kubernetes.io/name: shop-web, version: v2, pod-template-hash: 7d4f},
          ownerReferences: [{apiVersion: apps/v1, kind: ReplicaSet, name: web-7d4f, uid: u, controller: true}]",
        ", serviceAccountName: web",
        ", podIPs: [{ip: 10.1.0.2}, {ip: 'fd00::2'}]",
    ));
    let pod = world.pod("web-7d4f-x2");
    assert_eq!(pod.uid, "Kubernetes//Pod/shop/web-7d4f-x2");
    assert_eq!((pod.name.as_str(), pod.namespace.as_str(), pod.node.as_str()), ("web-7d4f-x2", "shop", "node-a"));
    assert_eq!((pod.service_account.as_str(), pod.trust_domain.as_str()), ("web", ""));
    assert_eq!(pod.addresses.iter().map(Vec::len).collect::<Vec<_>>(), [4, 16]);
    assert_eq!((pod.workload_name.as_str(), pod.workload_type().as_str_name()), ("web", "DEPLOYMENT"));
    assert_eq!((pod.canonical_name.as_str(), pod.canonical_revision.as_str()), ("shop-web", "v2"));
}

#[test]
fn what_made_a_pod_is_told_from_its_owner() {
    let owned = |kind: &str, name: &str| {
        let owner = format!(", ownerReferences: [{{apiVersion: v1, kind: {kind}, name: {name}, uid: u}}]");
        let pod = World::new(&pod_with("p", "10.1.0.2", &owner, "", "")).pod("p");
        (pod.workload_type().as_str_name().to_owned(), pod.workload_name)
    };
    let check = |kind, name, expected: (&str, &str)| {
        assert_eq!(owned(kind, name), (expected.0.to_owned(), expected.1.to_owned()), "{kind} {name}");
    };
    check("ReplicaSet", "web-7d4f", ("DEPLOYMENT", "web-7d4f"));
    check("StatefulSet", "db", ("DEPLOYMENT", "db"));
    check("Job", "import", ("JOB", "import"));
    check("Job", "nightly-29381760", ("CRONJOB", "nightly"));
    check("Thing", "any", ("POD", "p"));
}

#[test]
fn defaults_are_left_empty_on_the_wire_and_others_are_not() {
    let manifest = pod("web", "10.1.0.2");
    assert_eq!(World::new(&manifest).pod("web").service_account, "");
    assert_eq!(World::of("example.org", &manifest).pod("web").trust_domain, "example.org");
    assert_eq!(World::new(&manifest).pod("web").canonical_revision, "latest");
}

#[test]
fn a_pod_without_an_address_or_at_its_end_is_not_served() {
    let mut world = World::new(&pod_with("web", "", "", "", ""));
    assert!(world.find_pod("shop", "web").is_none());
    world.apply(&pod("web", "10.1.0.2"));
    assert!(world.find_pod("shop", "web").is_some());
    for phase in ["Succeeded", "Failed"] {
        world.apply(&pod_with("web", "10.1.0.2", "", "", &format!(", phase: {phase}")));
        assert!(world.find_pod("shop", "web").is_none(), "{phase}");
    }
}

#[test]
fn readiness_follows_the_ready_condition_and_without_conditions_the_phase() {
    let check = |status: &str, expected: bool| {
        assert_eq!(World::new(&pod_with("web", "10.1.0.2", "", "", status)).healthy("web"), expected, "{status}");
    };
    check("", true);
    check(", phase: Running", true);
    check(", phase: Pending", false);
    check(", conditions: []", true);
    check(", conditions: [{type: Ready, status: 'True'}]", true);
    check(", conditions: [{type: Ready, status: 'False'}]", false);
    check(", conditions: [{type: Initialized, status: 'True'}]", false);
}

#[test]
fn the_mesh_has_the_ranges_of_its_nodes_once_each() {
    let node =
        |name: &str, spec: &str| format!("---\napiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{{spec}}}\n");
    let mut world = World::new(&(node("a", "podCIDR: 10.1.0.9/24") + &node("b", "podCIDRs: [10.1.0.0/24, 'fd00::/64']")));
    let ranges = |world: &World| {
        let value = &world.resources[&(ResourceKind::Mesh, "mesh".to_owned())];
        crate::proto::culvert::Mesh::decode(&*value.value).unwrap().cluster_ranges
    };
    assert_eq!(ranges(&world), ["10.1.0.0/24", "fd00::/64"]);
    world.remove(Kind::Node, "", "b");
    assert_eq!(ranges(&world), ["10.1.0.0/24"]);
    assert_eq!(world.update.nodes.as_ref().unwrap().iter().collect::<Vec<_>>(), ["a"]);
}

#[test]
fn ranges_that_no_node_declares_are_told_beside_those_of_nodes() {
    let mut settings = settings("cluster.local");
    settings.cluster_ranges = vec!["10.96.0.0/12".parse().unwrap()];
    let mut index = Index::new(settings);
    let node = "apiVersion: v1\nkind: Node\nmetadata: {name: node-a}\nspec: {podCIDRs: [10.1.0.0/24]}\n";
    let objects = objects(node, &index.settings.context());
    let changes = objects.into_iter().map(|object| Change::Applied { object: Arc::new(object), origin: "test".into() });
    let update = index.apply(&changes.collect::<Vec<_>>());
    let mesh = update.resources.iter().find(|(kind, ..)| *kind == ResourceKind::Mesh);
    let value = mesh.and_then(|(_, _, resource)| resource.clone()).expect("the mesh is told of").value;
    assert_eq!(crate::proto::culvert::Mesh::decode(&*value).unwrap().cluster_ranges, ["10.1.0.0/24", "10.96.0.0/12"]);
}
