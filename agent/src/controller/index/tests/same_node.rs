use prost::Message;

use super::{World, pod_with};
use crate::controller::source::Kind;
use crate::proto::culvert::{SameNode, same_node::Way};

fn namespace(labels: &str) -> String {
    format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, labels: {{{labels}}}}}\n")
}

fn web(labels: &str) -> String {
    pod_with("web", "10.1.0.2", &format!(", labels: {{culvert.dev/mesh: enabled{labels}}}"), "", "")
}

/// The way that agents hear of.
fn way(world: &World) -> Way {
    let workload = world.pod("web");
    let extension = workload.extensions.iter().find(|extension| extension.name == "same_node");
    extension.map_or(Way::Kernel, |extension| SameNode::decode(&*extension.config.as_ref().unwrap().value).unwrap().way())
}

#[test]
fn the_narrowest_way_wins_and_an_unknown_one_is_the_tunnel() {
    let check = |mesh: crate::model::SameNode, of_namespace: &str, of_pod: &str, expected: Way| {
        let label = |value: &str| if value.is_empty() { String::new() } else { format!("culvert.dev/same-node: {value}") };
        let own = if of_pod.is_empty() { String::new() } else { format!(", {}", label(of_pod)) };
        let world = World::with_way(mesh, &(namespace(&label(of_namespace)) + &web(&own)));
        assert_eq!(way(&world), expected, "mesh {mesh}, namespace {of_namespace}, pod {of_pod}");
    };
    let (kernel, tunnel) = (crate::model::SameNode::Kernel, crate::model::SameNode::Tunnel);
    check(kernel, "", "", Way::Kernel);
    check(tunnel, "", "", Way::Tunnel);
    check(kernel, "tunnel", "", Way::Tunnel);
    check(tunnel, "kernel", "", Way::Kernel);
    check(kernel, "tunnel", "kernel", Way::Kernel);
    check(tunnel, "kernel", "tunnel", Way::Tunnel);
    check(kernel, "kernel", "Tunnel", Way::Tunnel);
    check(kernel, "encrypted", "", Way::Tunnel);
    check(kernel, "encrypted", "kernel", Way::Kernel);
}

#[test]
fn a_namespaces_way_is_followed() {
    let mut world = World::new(&web(""));
    assert_eq!(way(&world), Way::Kernel);
    world.apply(&namespace("culvert.dev/same-node: tunnel"));
    assert_eq!(way(&world), Way::Tunnel);
    world.remove(Kind::Namespace, "", "shop");
    assert_eq!(way(&world), Way::Kernel);
}

#[test]
fn an_unknown_way_is_told_of_once_and_again_when_it_is_another() {
    let told = |world: &World, value: &str| {
        let about = |warning: &&String| {
            ["test: ", "shop", "metadata.labels[culvert.dev/same-node]", &format!("`{value}`"), "kernel or tunnel"]
                .iter()
                .all(|part| warning.contains(part))
        };
        world.warnings.iter().filter(about).count()
    };
    let mut world = World::new(&web(", culvert.dev/same-node: direct"));
    assert_eq!(told(&world, "direct"), 1, "{:?}", world.warnings);
    world.apply(&(web(", culvert.dev/same-node: direct") + &namespace("culvert.dev/same-node: fast")));
    assert_eq!((told(&world, "direct"), told(&world, "fast")), (1, 1), "{:?}", world.warnings);
    world.apply(&web(", culvert.dev/same-node: tunnel"));
    world.apply(&web(", culvert.dev/same-node: direct"));
    assert_eq!(told(&world, "direct"), 2, "{:?}", world.warnings);
}
