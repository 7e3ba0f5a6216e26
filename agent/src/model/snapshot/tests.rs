use super::*;
use crate::model::{
    Action, Authorization, Flow, PeerAuthentication, PortMapping, Rule, SameNode, Scope, ServedPorts, SpiffeId, TunnelProtocol,
};

/// A ready pod of the mesh at `address`, on node `n1`.
pub(crate) fn pod(name: &str, address: &str) -> Workload {
    let trust_domain: TrustDomain = "cluster.local".parse().unwrap();
    Workload {
        uid: format!("Kubernetes//Pod/a/{name}").into(),
        name: name.into(),
        identity: SpiffeId::new(trust_domain, "a", name).unwrap(),
        addresses: address.parse::<IpAddr>().unwrap().into(),
        node: "n1".into(),
        protocol: TunnelProtocol::Hbone,
        host_network: false,
        healthy: true,
        telemetry: Arc::default(),
        services: Arc::default(),
        authorization_policies: Arc::default(),
        peer_authentication: Arc::default(),
        same_node: SameNode::default(),
        pod: None,
    }
}

/// A pod that serves `shop/web:80` on port 8080.
pub(crate) fn backend(name: &str, address: &str) -> Workload {
    let ports: Box<[_]> = [PortMapping { service_port: 80, target_port: 8080 }].into();
    let services: ServedPorts = [("a/web.a.svc.cluster.local".into(), ports)].into_iter().collect();
    Workload { services: services.into(), ..pod(name, address) }
}

#[test]
fn a_pod_is_found_by_its_uid_on_its_own_node_while_it_is_told() {
    let unplaced = |name: &str, uid: &str| Workload {
        addresses: Default::default(),
        pod: Some(Arc::new(uid.into())),
        ..pod(name, "10.0.0.1")
    };
    let found = |snapshot: &Snapshot, uid: &str| snapshot.pod(&uid.into()).map(|workload| workload.name.to_string());
    let first = with([unplaced("one", "uid-1"), Workload { node: "n2".into(), ..unplaced("far", "uid-2") }], []);
    assert_eq!((found(&first, "uid-1").as_deref(), found(&first, "uid-2")), (Some("one"), None));
    let after = |change: &dyn Fn(&mut Edit)| {
        let mut edit = first.edit();
        change(&mut edit);
        edit.finish()
    };
    assert_eq!(found(&after(&|edit| edit.upsert_workload(pod("one", "10.0.0.1"))), "uid-1"), None, "it has an address");
    assert_eq!(found(&after(&|edit| edit.remove_workload("Kubernetes//Pod/a/one")), "uid-1"), None, "it is gone");
    let anew = after(&|edit| edit.upsert_workload(unplaced("one", "uid-3")));
    assert_eq!((found(&anew, "uid-1"), found(&anew, "uid-3").as_deref()), (None, Some("one")), "it was made anew");
}

/// The service `web` at 10.96.0.1:80.
pub(crate) fn web() -> Service {
    Service {
        name: "web".into(),
        namespace: "a".into(),
        hostname: "web.a.svc.cluster.local".into(),
        addresses: vec!["10.96.0.1".parse().unwrap()],
        ports: vec![PortMapping { service_port: 80, target_port: 8080 }],
        node_local: false,
        unready_too: false,
    }
}

/// A snapshot of node `n1` with these objects.
pub(crate) fn with(workloads: impl IntoIterator<Item = Workload>, services: impl IntoIterator<Item = Service>) -> Snapshot {
    let mut edit = Snapshot::empty("n1").edit();
    workloads.into_iter().for_each(|workload| edit.upsert_workload(workload));
    services.into_iter().for_each(|service| edit.upsert_service(service));
    edit.finish()
}

fn destination(snapshot: &Snapshot, address: &str, port: u16) -> Option<Destination> {
    snapshot.destinations().get(&(address.parse().unwrap(), port)).copied()
}

#[test]
fn a_pod_of_the_mesh_is_captured_and_another_passes() {
    let outside = Workload { protocol: TunnelProtocol::None, ..pod("out", "10.0.0.2") };
    let snapshot = with([pod("in", "10.0.0.1"), outside], []);
    assert_eq!(destination(&snapshot, "10.0.0.1", 0), Some(Destination::Capture));
    assert_eq!(destination(&snapshot, "10.0.0.2", 0), Some(Destination::Pass));
}

#[test]
fn disabled_ports_pass_and_the_others_are_captured() {
    let modes = |mode, port, own| PeerAuthentication { mode, ports: [(port, own)].into() }.into();
    let one = Workload { peer_authentication: modes(Mode::Strict, 81, Mode::Disable), ..pod("one", "10.0.0.1") };
    let two = Workload { peer_authentication: modes(Mode::Disable, 82, Mode::Strict), ..pod("two", "10.0.0.2") };
    let snapshot = with([one, two], []);
    assert_eq!(destination(&snapshot, "10.0.0.1", 0), Some(Destination::Capture));
    assert_eq!(destination(&snapshot, "10.0.0.1", 81), Some(Destination::Pass));
    assert_eq!(destination(&snapshot, "10.0.0.2", 0), Some(Destination::Pass));
    assert_eq!(destination(&snapshot, "10.0.0.2", 82), Some(Destination::Capture));
}

#[test]
fn a_removed_pod_leaves_no_destination_behind() {
    let modes = PeerAuthentication { mode: Mode::Strict, ports: [(81, Mode::Disable)].into() };
    let snapshot = with([Workload { peer_authentication: modes.into(), ..pod("one", "10.0.0.1") }], []);
    let mut edit = snapshot.edit();
    edit.remove_workload("Kubernetes//Pod/a/one");
    assert!(edit.finish().destinations().is_empty());
}

#[test]
fn a_workload_that_changes_is_found_as_it_is_now_everywhere() {
    let (uid, address) = ("Kubernetes//Pod/a/one", |text: &str| text.parse::<IpAddr>().unwrap());
    let mut edit = with([backend("one", "10.0.0.1")], [web()]).edit();
    edit.upsert_workload(Workload { healthy: false, ..backend("one", "10.0.0.2") });
    let snapshot = edit.finish();
    assert!(snapshot.workload(uid).is_some_and(|workload| !workload.healthy));
    assert!(snapshot.local_workloads().eq(snapshot.workload(uid)) && snapshot.workloads().eq(snapshot.workload(uid)));
    assert!(snapshot.workload_at(address("10.0.0.2")).is_some_and(|workload| !workload.healthy));
    assert!(snapshot.workload_at(address("10.0.0.1")).is_none());
    assert_eq!(destination(&snapshot, "10.0.0.1", 0), None);
    let endpoints = snapshot.endpoints(&web().key()).unwrap();
    assert_eq!((endpoints.ready.len(), endpoints.total), (0, 1));
    let mut edit = snapshot.edit();
    edit.upsert_workload(Workload { services: Arc::default(), node: "n2".into(), ..pod("one", "10.0.0.2") });
    let snapshot = edit.finish();
    assert_eq!((snapshot.endpoints(&web().key()).unwrap().total, snapshot.local_workloads().count()), (0, 0));
}

#[test]
fn an_address_that_a_new_pod_took_over_survives_the_old_ones_removal() {
    let mut edit = with([pod("old", "10.0.0.1")], []).edit();
    edit.upsert_workload(pod("new", "10.0.0.1"));
    edit.remove_workload("Kubernetes//Pod/a/old");
    let snapshot = edit.finish();
    assert_eq!(snapshot.workload_at("10.0.0.1".parse().unwrap()).map(|workload| &*workload.name), Some("new"));
    assert_eq!(destination(&snapshot, "10.0.0.1", 0), Some(Destination::Capture));
}

#[test]
fn a_port_that_the_pod_before_had_in_plaintext_is_not_its_successors() {
    let modes = PeerAuthentication { mode: Mode::Strict, ports: [(8080, Mode::Disable)].into() };
    let old = Workload { peer_authentication: modes.into(), ..pod("old", "10.0.0.1") };
    let snapshot = with([old], []);
    assert_eq!(destination(&snapshot, "10.0.0.1", 8080), Some(Destination::Pass));
    let mut edit = snapshot.edit();
    edit.upsert_workload(pod("new", "10.0.0.1"));
    edit.remove_workload("Kubernetes//Pod/a/old");
    let snapshot = edit.finish();
    assert_eq!(destination(&snapshot, "10.0.0.1", 8080), None);
    assert_eq!(destination(&snapshot, "10.0.0.1", 0), Some(Destination::Capture));
}

#[test]
fn a_service_is_captured_on_its_ports_and_refused_on_others() {
    let snapshot = with([backend("one", "10.0.0.1")], [web()]);
    assert_eq!(destination(&snapshot, "10.96.0.1", 80), Some(Destination::Capture));
    assert_eq!(destination(&snapshot, "10.96.0.1", 0), Some(Destination::Refuse));
}

#[test]
fn a_service_without_a_ready_endpoint_is_refused_and_one_outside_the_mesh_is_left_alone() {
    let unready = Workload { healthy: false, ..backend("one", "10.0.0.1") };
    assert_eq!(destination(&with([unready], [web()]), "10.96.0.1", 80), Some(Destination::Refuse));
    assert_eq!(destination(&with([], [web()]), "10.96.0.1", 80), Some(Destination::Refuse));
    let outside = Workload { protocol: TunnelProtocol::None, ..backend("one", "10.0.0.1") };
    assert_eq!(destination(&with([outside], [web()]), "10.96.0.1", 80), None);
}

#[test]
fn a_node_local_service_counts_only_this_nodes_endpoints() {
    let local = Service { node_local: true, ..web() };
    let elsewhere = Workload { node: "n2".into(), ..backend("far", "10.0.1.1") };
    let snapshot = with([backend("near", "10.0.0.1"), elsewhere.clone()], [local.clone()]);
    let ready = &snapshot.endpoints(&local.key()).unwrap().ready;
    assert_eq!(ready.iter().map(|workload| &*workload.name).collect::<Vec<_>>(), ["near"]);
    assert_eq!(destination(&with([elsewhere], [local]), "10.96.0.1", 80), Some(Destination::Refuse));
}

#[test]
fn an_endpoint_that_comes_after_its_service_is_found_and_one_that_goes_is_not() {
    let mut edit = with([], [web()]).edit();
    edit.upsert_workload(backend("one", "10.0.0.1"));
    let snapshot = edit.finish();
    assert_eq!(destination(&snapshot, "10.96.0.1", 80), Some(Destination::Capture));
    let mut edit = snapshot.edit();
    edit.remove_workload("Kubernetes//Pod/a/one");
    assert_eq!(destination(&edit.finish(), "10.96.0.1", 80), Some(Destination::Refuse));
}

#[test]
fn policies_apply_by_scope_and_missing_ones_are_named() {
    let policy = |name: &str, namespace: &str, scope| Authorization {
        namespace: namespace.into(),
        name: name.into(),
        scope,
        action: Action::Deny,
        dry_run: false,
        rules: vec![Rule::default()],
    };
    let mut edit = Snapshot::empty("n1").edit();
    edit.upsert_policy(policy("mesh", "istio-system", Scope::Global));
    edit.upsert_policy(policy("here", "a", Scope::Namespace));
    edit.upsert_policy(policy("elsewhere", "b", Scope::Namespace));
    edit.upsert_policy(policy("chosen", "a", Scope::WorkloadSelector));
    edit.upsert_policy(policy("other", "a", Scope::WorkloadSelector));
    let workload = Workload { authorization_policies: vec!["a/chosen".into(), "a/late".into()].into(), ..pod("one", "10.0.0.1") };
    let applying = |edit: Edit| {
        let (found, missing) = edit.finish().policies_for(&workload);
        let found: Vec<_> = found.candidates(&flow()).into_iter().map(|policy| policy.name.to_string()).collect();
        (found, missing.iter().map(ToString::to_string).collect::<Vec<_>>())
    };
    let unknown = edit.finish();
    let mut edit = unknown.edit();
    edit.upsert_workload(workload.clone());
    let known = edit.finish();
    for snapshot in [&unknown, &known] {
        let (found, missing) = applying(snapshot.edit());
        assert_eq!((found, missing), (texts(&["mesh", "here", "chosen"]), texts(&["a/late"])));
        let mut edit = snapshot.edit();
        edit.upsert_policy(policy("late", "a", Scope::WorkloadSelector));
        edit.remove_policy("istio-system/mesh");
        edit.remove_policy("a/here");
        edit.remove_policy("a/chosen");
        assert_eq!(applying(edit), (texts(&["late"]), texts(&["a/chosen"])));
    }
    let mut edit = known.edit();
    edit.upsert_workload(Workload { authorization_policies: vec!["a/other".into()].into(), ..workload.clone() });
    assert_eq!(applying(edit).0, ["mesh", "here", "chosen"], "a workload is judged by the policies that it names itself");
}

fn texts(texts: &[&str]) -> Vec<String> {
    texts.iter().map(ToString::to_string).collect()
}

fn flow() -> Flow {
    Flow { source_identity: None, source: "10.0.0.9:4711".parse().unwrap(), destination: "10.0.0.1:80".parse().unwrap() }
}
