use std::fmt::Write as _;

use super::{World, pod, pod_with};
use crate::controller::index::ResourceKind;

const SERVICE: &str = "
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.0.1, selector: {app: web}, ports: [{port: 80}]}
";

fn slice(changed: &str) -> String {
    let mut endpoints = String::new();
    for number in 2..50 {
        let ready = if changed == format!("web-{number}") { "false" } else { "true" };
        write!(endpoints, "{{addresses: [10.1.0.{number}], conditions: {{ready: {ready}}}}}, ").unwrap();
    }
    format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\nports: [{{port: 80}}]\n\
         metadata: {{name: s, namespace: shop, labels: {{kubernetes.io/service-name: web}}}}\nendpoints: [{endpoints}]\n"
    )
}

fn mesh() -> World {
    let mut manifests = SERVICE.to_owned() + &slice("");
    for number in 2..50 {
        manifests += &pod(&format!("web-{number}"), &format!("10.1.0.{number}"));
    }
    World::new(&manifests)
}

#[test]
fn one_changed_pod_touches_itself_only() {
    let mut world = mesh();
    world.apply(&pod_with("web-7", "10.1.0.7", "", "", ", phase: Pending"));
    assert_eq!(world.touched(), ["Kubernetes//Pod/shop/web-7"]);
}

#[test]
fn one_changed_endpoint_touches_its_pod_only() {
    let mut world = mesh();
    world.apply(&slice("web-7"));
    assert_eq!(world.touched(), ["Kubernetes//Pod/shop/web-7"]);
    assert!(!world.healthy("web-7"));
}

#[test]
fn the_same_objects_give_the_same_versions() {
    let versions = || {
        let mut world = World::new("");
        let labels = ", labels: {a: b}";
        world.apply(&pod_with("web", "10.1.0.2", labels, "", ""));
        for number in 0..8 {
            let service = SERVICE.replace("name: web,", &format!("name: web-{number},")).replace("{app: web}", "{a: b}");
            world.apply(&service.replace("10.96.0.1", "None"));
        }
        let ports = (1..9).map(|port| format!("{port}: {{mode: STRICT}}")).collect::<Vec<_>>().join(", ");
        world.apply(&format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: p, namespace: shop}}\n\
             spec: {{selector: {{matchLabels: {{a: b}}}}, portLevelMtls: {{{ports}}}}}\n"
        ));
        assert_eq!(world.pod("web").services.len(), 8);
        let versions = world.update.resources.iter().filter_map(|(_, _, resource)| Some(resource.as_ref()?.version.to_string()));
        versions.collect::<Vec<_>>()
    };
    let first = versions();
    assert!(!first.is_empty());
    for _ in 0..10 {
        assert_eq!(versions(), first);
    }
}

#[test]
fn objects_that_nobody_else_depends_on_may_be_missing() {
    let world = World::new(&pod_with("web", "10.1.0.2", "", ", serviceAccountName: nobody-made-it", ""));
    assert!(world.find_pod("shop", "web").is_some());
    assert!(world.warnings.is_empty());
    assert!(world.update.resources.iter().any(|(kind, _, _)| *kind == ResourceKind::Mesh));
}
