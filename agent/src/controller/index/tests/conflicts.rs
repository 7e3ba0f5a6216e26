use super::{World, pod, pod_with};
use crate::controller::source::Kind;

fn pod_of(name: &str, created: &str) -> String {
    pod_with(name, "10.1.0.2", &format!(", creationTimestamp: '{created}'"), "", "")
}

#[test]
fn the_older_of_two_pods_with_one_address_keeps_it_and_both_are_named_once() {
    let mut world = World::new(&pod_of("young", "2026-01-02T00:00:00Z"));
    assert!(world.find_pod("shop", "young").is_some());
    world.apply(&pod_of("old", "2026-01-01T00:00:00Z"));
    assert!(world.find_pod("shop", "old").is_some());
    assert!(world.find_pod("shop", "young").is_none());
    assert_eq!(world.warnings.len(), 1, "{:?}", world.warnings);
    assert!(world.warnings[0].contains("shop/old and shop/young") && world.warnings[0].contains("10.1.0.2"));
    world.apply(&pod_of("old", "2026-01-01T00:00:00Z"));
    assert_eq!(world.warnings.len(), 1);
    world.remove(Kind::Pod, "shop", "old");
    assert!(world.find_pod("shop", "young").is_some());
    world.apply(&pod_of("old", "2026-01-01T00:00:00Z"));
    assert_eq!(world.warnings.len(), 2, "a conflict that comes back is told again");
}

#[test]
fn pods_of_one_age_are_ranked_by_name_and_an_unknown_age_is_the_youngest() {
    let world = World::new(&(pod("b", "10.1.0.2") + &pod("a", "10.1.0.2")));
    assert!(world.find_pod("shop", "a").is_some() && world.find_pod("shop", "b").is_none());
    let world = World::new(&(pod_of("b", "2026-01-01T00:00:00Z") + &pod("a", "10.1.0.2")));
    assert!(world.find_pod("shop", "b").is_some() && world.find_pod("shop", "a").is_none());
}

#[test]
fn a_pod_that_has_ended_or_shares_its_nodes_network_is_in_nobodys_way() {
    let ended = pod_with("a", "10.1.0.2", "", "", ", phase: Succeeded");
    let world = World::new(&(ended + &pod("b", "10.1.0.2")));
    assert!(world.find_pod("shop", "b").is_some());
    let host = |name| pod_with(name, "192.168.0.1", "", ", hostNetwork: true", "");
    let world = World::new(&(host("a") + &host("b")));
    assert!(world.find_pod("shop", "a").is_some() && world.find_pod("shop", "b").is_some());
    assert!(world.warnings.is_empty());
}

#[test]
fn an_address_moves_to_its_new_pod() {
    let mut world = World::new(&pod("a", "10.1.0.2"));
    world.apply(&(pod("a", "10.1.0.3") + &pod("b", "10.1.0.2")));
    assert_eq!(world.pod("a").addresses, [[10, 1, 0, 3]]);
    assert_eq!(world.pod("b").addresses, [[10, 1, 0, 2]]);
    assert!(world.warnings.is_empty());
}

#[test]
fn one_address_in_two_notations_is_one_address() {
    let world = World::new(&(pod("a", "10.1.0.2") + &pod("b", "::ffff:10.1.0.2")));
    assert!(world.find_pod("shop", "b").is_none());
}

#[test]
fn a_pod_of_the_mesh_on_a_node_that_there_is_not_is_named_once() {
    let node = "---\napiVersion: v1\nkind: Node\nmetadata: {name: node-a}\n";
    let enrolled = pod_with("a", "10.1.0.2", ", labels: {culvert.dev/mesh: enabled}", "", "");
    let mut world = World::new(&(enrolled.clone() + &pod("b", "10.1.0.3")));
    assert_eq!(world.warnings.len(), 1, "{:?}", world.warnings);
    for part in ["pod shop/a", "`node-a`", "spec.nodeName"] {
        assert!(world.warnings[0].contains(part), "{:?}", world.warnings);
    }
    world.apply(&enrolled);
    world.apply(node);
    assert_eq!(world.warnings.len(), 1);
    world.remove(Kind::Node, "", "node-a");
    assert_eq!(world.warnings.len(), 2, "a pod that has lost its node is told of");
    let world = World::new(&(node.to_owned() + &enrolled));
    assert!(world.warnings.is_empty(), "{:?}", world.warnings);
}
