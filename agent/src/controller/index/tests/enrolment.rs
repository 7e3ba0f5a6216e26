use prost::Message as _;

use super::{World, pod, pod_with, settings};
use crate::controller::index::{MeshSettings, Resource};
use crate::controller::source::Kind;
use crate::model::SpiffeId;
use crate::proto::culvert;
use crate::proto::workload::{Address, TunnelProtocol, address};

fn namespace(labels: &str) -> String {
    format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, labels: {{{labels}}}}}\n")
}

#[test]
fn the_narrower_label_wins_and_of_two_at_one_place_culverts_own() {
    let check = |namespace_labels: &str, pod_labels: &str, expected: bool| {
        let pod = pod_with("web", "10.1.0.2", &format!(", labels: {{{pod_labels}}}"), "", "");
        let world = World::new(&(namespace(namespace_labels) + &pod));
        assert_eq!(world.enrolled("web"), expected, "namespace {namespace_labels}, pod {pod_labels}");
    };
    let (enabled, disabled) = ("culvert.dev/mesh: enabled", "culvert.dev/mesh: disabled");
    let (ambient, none) = ("istio.io/dataplane-mode: ambient", "istio.io/dataplane-mode: none");
    check("", "", false);
    check(enabled, "", true);
    check(ambient, "", true);
    check("", enabled, true);
    check("", ambient, true);
    check(enabled, disabled, false);
    check(enabled, none, false);
    check(ambient, disabled, false);
    check(disabled, ambient, true);
    check(none, enabled, true);
    check(&format!("{enabled}, {none}"), "", true);
    check(&format!("{disabled}, {ambient}"), "", false);
    check("", &format!("{enabled}, {none}"), true);
    check("", &format!("{disabled}, {ambient}"), false);
    check("culvert.dev/mesh: 'yes'", "", false);
    check(enabled, "culvert.dev/mesh: perhaps", true);
}

#[test]
fn a_pod_on_its_nodes_network_never_joins() {
    let manifest = pod_with("web", "192.168.0.1", ", labels: {culvert.dev/mesh: enabled}", ", hostNetwork: true", "");
    let world = World::new(&manifest);
    assert!(!world.enrolled("web"));
    assert_eq!(world.pod("web").network_mode().as_str_name(), "HOST_NETWORK");
    assert!(!world.update.residents.contains("node-a", &"spiffe://cluster.local/ns/shop/sa/default".parse().unwrap()));
}

#[test]
fn a_namespaces_label_is_followed() {
    let mut world = World::new(&pod("web", "10.1.0.2"));
    assert!(!world.enrolled("web"));
    world.apply(&namespace("culvert.dev/mesh: enabled"));
    assert!(world.enrolled("web"));
    world.remove(Kind::Namespace, "", "shop");
    assert!(!world.enrolled("web"));
}

#[test]
fn an_identity_resides_where_an_enrolled_pod_has_it_and_until_the_last_is_gone() {
    let identity: SpiffeId = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
    let account = ", serviceAccountName: web";
    let label = ", labels: {culvert.dev/mesh: enabled}";
    // A certificate may be needed before the pod's address is known.
    let mut world = World::new(&(pod_with("web-1", "", label, account, "") + &pod_with("web-2", "10.1.0.3", label, account, "")));
    assert!(world.update.residents.contains("node-a", &identity));
    assert!(!world.update.residents.contains("node-b", &identity));
    world.remove(Kind::Pod, "shop", "web-1");
    assert!(world.update.residents.contains("node-a", &identity));
    world.apply(&pod_with("web-2", "10.1.0.3", label, account, ", phase: Succeeded"));
    assert!(!world.update.residents.contains("node-a", &identity));
    world.apply(&pod_with("web-3", "10.1.0.4", "", account, ""));
    assert!(!world.update.residents.contains("node-a", &identity));
}

#[test]
fn a_pod_without_an_address_is_told_of_by_its_uid_or_if_it_will_be_in_the_mesh() {
    let awaited = |labels: &str, uid: &str, node: &str| {
        let manifest = format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: web, namespace: shop, {uid}labels: {{{labels}}}}}\n\
             spec: {{{node}containers: []}}\n"
        );
        World::new(&manifest).resources.keys().any(|(_, name)| name.ends_with("/shop/web"))
    };
    let enabled = "culvert.dev/mesh: enabled";
    for uid in ["", "uid: a37182395, "] {
        assert!(awaited(enabled, uid, "nodeName: node-a, "));
        assert!(!awaited(enabled, uid, ""), "on no node yet");
        assert!(!awaited(enabled, uid, "nodeName: node-a, hostNetwork: true, "), "on its node's network");
    }
    assert!(awaited("", "uid: a37182395, ", "nodeName: node-a, "), "its namespace need not wait");
    assert!(!awaited("", "", "nodeName: node-a, "), "nobody could tell which it is");
}

#[test]
fn the_uid_of_a_pod_is_told_to_its_node_alone() {
    let resource = |uid: &str| {
        let metadata = format!(", uid: {uid}, labels: {{culvert.dev/mesh: enabled}}");
        let world = World::new(&pod_with("web", "10.1.0.2", &metadata, "", ""));
        let mut resources = world.update.resources.into_iter();
        resources.find_map(|(_, name, resource)| resource.filter(|_| name.ends_with("/web"))).expect("the pod is told of")
    };
    let pods_at = |resource: &Resource, node: &str| -> Vec<String> {
        let Ok(Address { r#type: Some(address::Type::Workload(workload)) }) = Address::decode(&*resource.value_for(node)) else {
            panic!("a workload")
        };
        assert_eq!((&*workload.name, workload.tunnel_protocol()), ("web", TunnelProtocol::Hbone), "all else is told to all");
        let named = workload.extensions.into_iter().filter(|extension| extension.name == "pod_uid");
        named.map(|extension| culvert::Pod::decode(&*extension.config.expect("a message").value).expect("a pod").uid).collect()
    };
    let first = resource("a37182395");
    assert_eq!((pods_at(&first, "node-a"), pods_at(&first, "node-b")), (vec!["a37182395".to_owned()], vec![]));
    assert_ne!(first.version, resource("b37182395").version, "another pod of its name");
}

#[test]
fn nothing_is_said_of_a_pod_before_its_namespace_is_known() {
    let behind = || World::with(MeshSettings { namespaces_told: true, ..settings("cluster.local") }, &pod("web", "10.1.0.2"));
    let known = |world: &World| world.resources.keys().any(|(_, name)| name.ends_with("/web"));
    for (labels, enrolled) in [("culvert.dev/mesh: enabled", true), ("", false)] {
        let mut world = behind();
        assert!(!known(&world), "it counts as outside of the mesh");
        world.apply(&namespace(labels));
        assert!(known(&world) && world.enrolled("web") == enrolled, "{labels}");
        world.remove(Kind::Namespace, "", "shop");
        assert!(!known(&world), "what its namespace said is not known any more");
    }
}
