use prost::Message;

use super::{World, pod, pod_with};
use crate::controller::index::ResourceKind;
use crate::controller::source::Kind;
use crate::proto::workload::{Address, NetworkMode, TunnelProtocol, WorkloadStatus, address, load_balancing};

fn service(spec: &str) -> String {
    format!("---\napiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: shop}}\nspec: {{{spec}}}\n")
}

fn slice(name: &str, ports: &str, endpoints: &str) -> String {
    format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
         metadata: {{name: {name}, namespace: shop, labels: {{kubernetes.io/service-name: web}}}}\n\
         ports: [{ports}]\nendpoints: [{endpoints}]\n"
    )
}

const HTTP: &str = "clusterIP: 10.96.0.1, selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]";

#[test]
fn a_service_has_all_its_cluster_addresses_and_its_tcp_ports() {
    let world = World::new(&service(
        "clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1, 'fd00::1'], ports: [{port: 80, targetPort: 8080}, {port: 81},
         {port: 82, targetPort: named}, {port: 53, protocol: UDP}]",
    ));
    let service = world.find_service("web").unwrap();
    assert_eq!(service.hostname, "web.shop.svc.cluster.local");
    assert_eq!(service.addresses.iter().map(|address| address.address.len()).collect::<Vec<_>>(), [4, 16]);
    let ports: Vec<_> = service.ports.iter().map(|port| (port.service_port, port.target_port)).collect();
    assert_eq!(ports, [(80, 8080), (81, 81), (82, 0)]);
    assert_eq!(service.ip_families().as_str_name(), "DUAL");
    assert_eq!(service.load_balancing, None);
}

#[test]
fn a_headless_service_has_no_address_and_an_external_name_is_no_service() {
    assert!(World::new(&service("clusterIP: None, clusterIPs: [None]")).find_service("web").unwrap().addresses.is_empty());
    let mut world = World::new(&service(HTTP));
    world.apply(&service("type: ExternalName, externalName: example.org"));
    assert!(world.find_service("web").is_none());
}

#[test]
fn local_traffic_policy_means_endpoints_of_the_clients_node_only() {
    let service = World::new(&service("clusterIP: 10.96.0.1, internalTrafficPolicy: Local")).find_service("web").unwrap();
    let balancing = service.load_balancing.unwrap();
    assert_eq!(balancing.mode(), load_balancing::Mode::Strict);
    assert_eq!(balancing.routing_preference, [i32::from(load_balancing::Scope::Node)]);
}

#[test]
fn unready_endpoints_count_where_the_service_publishes_them() {
    let balancing = |spec: &str| World::new(&service(spec)).find_service("web").unwrap().load_balancing;
    let published = balancing("clusterIP: 10.96.0.1, publishNotReadyAddresses: true").unwrap();
    assert_eq!(published.health_policy(), load_balancing::HealthPolicy::AllowAll);
    assert_eq!((published.mode(), published.routing_preference), (load_balancing::Mode::UnspecifiedMode, Vec::new()));
    assert_eq!(balancing("clusterIP: 10.96.0.1, publishNotReadyAddresses: false"), None);
}

#[test]
fn without_any_slice_the_selector_finds_the_endpoints() {
    let named = pod_with("web", "10.1.0.2", ", labels: {app: web}", "", "").replace(
        "containers: []",
        "containers: [{name: c, ports: [{name: dns, containerPort: 53, protocol: UDP}, {name: dns, containerPort: 9000}]}]",
    );
    let world = World::new(&(service(&HTTP.replace("8080", "dns")) + &named + &pod("db", "10.1.0.3")));
    assert_eq!(world.ports("web", "web"), Some(vec![(80, 9000)]));
    assert_eq!(world.ports("db", "web"), None);
}

#[test]
fn a_service_without_a_selector_has_no_endpoints_without_slices() {
    let world = World::new(&(service("clusterIP: 10.96.0.1, ports: [{port: 80}]") + &pod("web", "10.1.0.2")));
    assert_eq!(world.ports("web", "web"), None);
}

#[test]
fn a_slice_takes_the_place_of_the_selector_as_long_as_it_is_there() {
    let mut world = World::new(&(service(HTTP) + &pod("web", "10.1.0.2") + &pod("other", "10.1.0.3")));
    assert_eq!(world.ports("web", "web"), Some(vec![(80, 8080)]));
    world.apply(&slice("s", "{name: http, port: 7070}", "{addresses: [10.1.0.3]}"));
    assert_eq!((world.ports("web", "web"), world.ports("other", "web")), (None, Some(vec![(80, 7070)])));
    world.remove(Kind::EndpointSlice, "shop", "s");
    assert_eq!((world.ports("web", "web"), world.ports("other", "web")), (Some(vec![(80, 8080)]), None));
}

#[test]
fn an_endpoint_is_found_by_its_reference_before_its_address() {
    let by_name = "{addresses: [10.1.0.9], targetRef: {kind: Pod, name: web, namespace: shop}}";
    let world = World::new(&(service(HTTP) + &pod("web", "10.1.0.2") + &slice("s", "{name: http, port: 8080}", by_name)));
    assert_eq!(world.ports("web", "web"), Some(vec![(80, 8080)]));
}

#[test]
fn any_order_of_objects_leads_to_the_same() {
    let parts = [pod("web", "10.1.0.2"), service(HTTP), slice("s", "{name: http, port: 7070}", "{addresses: [10.1.0.2]}")];
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let mut world = World::new("");
        for part in order {
            world.apply(&parts[part]);
        }
        assert_eq!(world.ports("web", "web"), Some(vec![(80, 7070)]), "{order:?}");
    }
}

#[test]
fn an_endpoint_that_is_not_ready_makes_the_workload_unhealthy() {
    let endpoint =
        |ready: &str| slice("s", "{name: http, port: 8080}", &format!("{{addresses: [10.1.0.2], conditions: {{{ready}}}}}"));
    let mut world = World::new(&(service(HTTP) + &pod("web", "10.1.0.2") + &endpoint("ready: false")));
    assert!(!world.healthy("web"));
    assert_eq!(world.ports("web", "web"), Some(vec![(80, 8080)]));
    world.apply(&endpoint("ready: true"));
    assert!(world.healthy("web"));
    // What is not known counts as ready (the EndpointSlice API's documentation).
    world.apply(&endpoint(""));
    assert!(world.healthy("web"));
}

#[test]
fn slices_of_one_service_add_up_and_repeat_nothing() {
    let two_ports = "clusterIP: 10.96.0.1, ports: [{name: a, port: 80}, {name: b, port: 90}]";
    let world = World::new(
        &(service(two_ports)
            + &pod("web", "10.1.0.2")
            + &slice("s1", "{name: a, port: 1}", "{addresses: [10.1.0.2]}")
            + &slice("s2", "{name: b, port: 2}", "{addresses: [10.1.0.2]}")
            + &slice("s3", "{name: b, port: 2}", "{addresses: [10.1.0.2]}")
            + &slice("s4", "{name: c, port: 3}, {name: a, port: 9, protocol: UDP}", "{addresses: [10.1.0.2, 10.9.9.9]}")),
    );
    assert_eq!(world.ports("web", "web"), Some(vec![(80, 1), (90, 2)]));
}

#[test]
fn a_slice_without_ports_leaves_them_to_the_service() {
    let world = World::new(&(service(HTTP) + &pod("web", "10.1.0.2") + &slice("s", "", "{addresses: [10.1.0.2]}")));
    assert_eq!(world.ports("web", "web"), Some(vec![(80, 8080)]));
}

#[test]
fn one_port_on_each_side_needs_no_common_name() {
    let world = World::new(&(service(HTTP) + &pod("web", "10.1.0.2") + &slice("s", "{port: 7070}", "{addresses: [10.1.0.2]}")));
    assert_eq!(world.ports("web", "web"), Some(vec![(80, 7070)]));
}

#[test]
fn an_endpoint_that_is_no_pod_is_a_workload_without_tunnels_until_a_pod_has_its_address() {
    let key = (ResourceKind::Address, "Kubernetes//EndpointSlice/shop/web/10.1.0.9".to_owned());
    let found = |world: &World| {
        let address = Address::decode(&*world.resources.get(&key)?.value).unwrap();
        match address.r#type.unwrap() {
            address::Type::Workload(workload) => Some(workload),
            address::Type::Service(_) => panic!("a workload"),
        }
    };
    let slice = |ready: bool| {
        slice("s", "{name: http, port: 6443}", &format!("{{addresses: [10.1.0.9], conditions: {{ready: {ready}}}}}"))
    };
    let mut world = World::new(&slice(true));
    assert!(found(&world).is_none(), "a slice without its service");
    world.apply(&service(HTTP));
    let workload = found(&world).unwrap();
    assert_eq!(workload.tunnel_protocol(), TunnelProtocol::None);
    assert_eq!(workload.network_mode(), NetworkMode::HostNetwork);
    assert_eq!((workload.addresses[0].len(), workload.status()), (4, WorkloadStatus::Healthy));
    let ports = &workload.services["shop/web.shop.svc.cluster.local"].ports;
    assert_eq!(ports.iter().map(|port| (port.service_port, port.target_port)).collect::<Vec<_>>(), [(80, 6443)]);
    world.apply(&slice(false));
    assert_eq!(found(&world).unwrap().status(), WorkloadStatus::Unhealthy);
    world.apply(&pod("late", "10.1.0.9"));
    assert!(found(&world).is_none());
    assert_eq!(world.ports("late", "web"), Some(vec![(80, 6443)]));
    world.remove(Kind::Pod, "shop", "late");
    assert!(found(&world).is_some());
    // An address of a pod that is not known yet is a pod's all the same.
    world.apply("---\napiVersion: v1\nkind: Node\nmetadata: {name: n}\nspec: {podCIDR: 10.1.0.0/24, podCIDRs: [10.1.0.0/24]}\n");
    assert!(found(&world).is_none());
    world.remove(Kind::Node, "", "n");
    assert!(found(&world).is_some());
    world.remove(Kind::EndpointSlice, "shop", "s");
    assert!(found(&world).is_none());
}
