//! Promise: agents of several nodes on one kernel, with one cgroup root and one directory of namespaces, do not disturb each other.

use harness::{Mesh, MeshSpec, PodSpec, app, eventually, mesh};

const PORT: u16 = 8080;

#[test]
fn a_pod_that_its_own_agent_has_enrolled_waits_for_no_other_agent() {
    for shared in [false, true] {
        let mut mesh = Mesh::prepare(MeshSpec::default());
        if shared {
            mesh.share_netns_dir();
        }
        mesh.start_all();
        for number in 0..24 {
            let (node, enrolled) = (number % 2, number % 4 < 2);
            let name = format!("pod-{number}");
            // The object is known before: nothing but the agents can hold the pod up.
            mesh.apply(&format!("pod-{name}"), &mesh::manifest(PodSpec { name: &name, namespace: "shop", node, enrolled }, 100));
            eventually("the agents know the object", || {
                (0..2).all(|node| mesh.admin(node, "/workloads").contains(&format!("\"{name}\"")))
            });
            let pod = mesh.place_only(PodSpec { name: &name, namespace: "shop", node, enrolled }, 100);
            let outside = ([10, 77, 0, 1], 15012).into();
            if enrolled {
                let log = ["agent-a", "agent-b"][node];
                eventually("it is enrolled", || mesh.log(log).contains(&format!("pod enrolled pod={name} ")));
                app::connect(&pod.netns, outside).expect("no other agent refuses it");
            } else {
                eventually("it may connect", || app::connect(&pod.netns, outside).is_ok());
            }
            mesh.delete(&format!("pod-{name}"));
        }
    }
}

#[test]
fn agents_with_one_directory_enrol_each_its_own_nodes_pods() {
    let mut mesh = Mesh::prepare(MeshSpec::default());
    mesh.share_netns_dir();
    mesh.start_all();
    let mut pods = Vec::new();
    for (name, node) in [("a-one", 0), ("a-two", 0), ("b-one", 1), ("b-two", 1)] {
        let pod = mesh.pod(PodSpec { name, namespace: "shop", node, enrolled: true });
        app::server(&pod.netns, PORT, app::echo);
        pods.push(pod);
    }
    for node in [0, 1] {
        assert_eq!(mesh.metrics(node).sum("culvert_enrolled_pods", &[]), 2, "the pods of node {node}");
    }
    for client in &pods {
        for server in pods.iter().filter(|server| server.v4 != client.v4) {
            for v6 in [false, true] {
                let (mut capture, mut local) = (mesh.capture_between_nodes(), mesh.capture_on_node(0));
                eventually("it is reached", || app::converse(&client.netns, server.at(v6, PORT), "marker-shared").is_ok());
                capture.finish();
                local.finish();
                assert!(!capture.shows(b"marker-shared") && !local.shows(b"marker-shared"));
            }
        }
    }
    // One of the agents goes: the other's pods do not notice.
    mesh.kill_agent(1);
    let reached = || app::converse(&pods[0].netns, pods[1].at(false, PORT), "hello");
    assert!(reached().is_ok());
    assert!(app::converse(&pods[2].netns, pods[3].at(false, PORT), "hello").is_err());
    mesh.start_agent(1);
    eventually("its own are back", || app::converse(&pods[2].netns, pods[3].at(false, PORT), "hello").is_ok());
    assert!(reached().is_ok());
}

#[test]
fn two_meshes_with_the_same_addresses_do_not_shut_out_each_others_pods() {
    let mut meshes = [Mesh::start(), Mesh::start()];
    let mut pods = Vec::new();
    for (name, node, enrolled) in [("server", 1, true), ("client", 0, true), ("outsider", 0, false)] {
        // By turns: each comes when the other mesh's agents know a pod of their own at its address, or are about to.
        pods.push(meshes.each_mut().map(|mesh| mesh.pod(PodSpec { name, namespace: "shop", node, enrolled })));
    }
    let [servers, clients, outsiders] = &pods[..] else { panic!("three pods a mesh") };
    for (number, server) in servers.iter().enumerate() {
        app::server(&server.netns, PORT, app::echo);
        let mut capture = meshes[number].capture_between_nodes();
        eventually("it is reached", || app::converse(&clients[number].netns, server.at(false, PORT), "marker-two").is_ok());
        capture.finish();
        assert!(!capture.shows(b"marker-two"), "each has its own tunnels");
        app::converse(&outsiders[number].netns, server.at(false, PORT), "plain").expect("no other agent refuses it");
        meshes[number].mode("shop", "STRICT");
        eventually("STRICT holds", || app::converse(&outsiders[number].netns, server.at(false, PORT), "plain").is_err());
        app::converse(&clients[number].netns, server.at(false, PORT), "sealed").expect("a member is served");
    }
}
