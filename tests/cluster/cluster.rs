//! The ground that the other tests stand on: nodes, pods on each, ways between them, and captures that see what is said in the clear.

use harness::Cluster;
use harness::cluster::PodSpec;
use serde_json::json;

#[test]
fn pods_of_both_nodes_reach_each_other_by_address_service_and_name_and_a_capture_sees_it() {
    let cluster = Cluster;
    let nodes = cluster.nodes();
    assert!(nodes.len() >= 2, "{nodes:?}");
    for node in &nodes {
        cluster.wait_condition("", &format!("node/{node}"), "Ready");
    }
    let namespace = cluster.namespace("ground", &[]);
    let client = PodSpec::new(namespace.name(), "client", &nodes[0]);
    let server = PodSpec::new(namespace.name(), "server", &nodes[1]);
    for (name, spec) in
        [("by-address", json!({})), ("headless", json!({"clusterIP": "None"})), ("from-outside", json!({"type": "NodePort"}))]
    {
        let mut spec = spec;
        spec["selector"] = json!({"app": "server"});
        spec["ports"] = json!([{"port": 8080}]);
        let metadata = json!({"name": name, "namespace": namespace.name()});
        cluster.apply(&json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}));
    }
    let addresses = cluster.pods(&[client, server]);
    let port = cluster.get(namespace.name(), "service", "from-outside")["spec"]["ports"][0]["nodePort"].clone();
    let mut capture = cluster.capture(&nodes[1]);
    let node_port = format!("{}:{port}", cluster.node_address(&nodes[0]));
    let ways = [
        format!("{}:8080", addresses[1]),
        "by-address:8080".to_owned(),
        "headless.ground.svc.cluster.local:8080".to_owned(),
        node_port.clone(),
    ];
    for (number, server) in ways.iter().enumerate() {
        let marker = format!("in-the-clear-{number}");
        let seen = cluster.converse_within(namespace.name(), "client", server, &marker, 20).expect(server);
        assert_eq!(seen.answer, marker, "by {server}");
        // The client of a node port comes with that node's address: the node translates, so that the answer passes it again.
        assert_eq!(seen.client == seen.local, *server != node_port, "by {server}: {seen:?}");
        assert!(capture.shows(&marker), "the capture does not show {marker}");
    }
    assert!(!capture.shows("never-said"));
    let flows = capture.flows();
    let crossed =
        |flow: &harness::cluster::Flow| flow.source.starts_with(&addresses[0]) && flow.destination.starts_with(&addresses[1]);
    assert!(flows.iter().any(crossed), "pods' addresses do not pass between the nodes: {flows:?}");
}

#[test]
fn a_privileged_daemon_set_sees_programs_cgroups_and_processes_of_its_node() {
    let cluster = Cluster;
    let namespace = cluster.namespace("daemons", &[]);
    let names: Vec<(String, String)> = cluster.nodes().into_iter().map(|node| (format!("pod-of-{node}"), node)).collect();
    let pods: Vec<PodSpec<'_>> = names.iter().map(|(name, node)| PodSpec::new(namespace.name(), name, node)).collect();
    cluster.pods(&pods);
    let host = |path: &str| json!({"name": path.trim_matches('/').replace('/', "-"), "hostPath": {"path": path}});
    let mount = |path: &str| json!({"name": path.trim_matches('/').replace('/', "-"), "mountPath": format!("/node{path}")});
    let paths = ["/sys/fs/bpf", "/sys/fs/cgroup", "/run/netns"];
    cluster.apply(&json!({
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": "looker", "namespace": namespace.name()},
        "spec": {
            "selector": {"matchLabels": {"app": "looker"}},
            "template": {
                "metadata": {"labels": {"app": "looker"}},
                "spec": {
                    "hostPID": true,
                    "hostNetwork": true,
                    "dnsPolicy": "ClusterFirstWithHostNet",
                    "terminationGracePeriodSeconds": 1,
                    "volumes": paths.map(host),
                    "containers": [{
                        "name": "app",
                        "image": harness::cluster::IMAGE,
                        "args": ["pause"],
                        "securityContext": {"privileged": true},
                        "volumeMounts": paths.map(mount),
                    }],
                },
            },
        },
    }));
    cluster.wait_rollout(namespace.name(), "daemonset/looker");
    let pods = cluster.list(namespace.name(), "pods");
    let lookers: Vec<_> = pods.iter().filter(|pod| pod["metadata"]["labels"]["app"] == "looker").collect();
    assert_eq!(lookers.len(), names.len());
    for pod in lookers {
        let look = |script: &str| {
            let name = pod["metadata"]["name"].as_str().expect("a pod has a name");
            cluster.exec(namespace.name(), name, &["sh", "-c", script]).expect(script)
        };
        assert!(look("grep /node/sys/fs/bpf /proc/mounts").contains(" bpf "), "no file system for programs");
        assert!(look("ls -R /node/sys/fs/cgroup | grep -c kubepods").trim() != "0", "no cgroups of pods");
        assert!(look("cat /proc/*/comm 2>/dev/null || true").contains("kubelet"), "no processes of the node");
        // Each runtime has names of its own for them.
        assert!(!look("ls /node/run/netns").trim().is_empty(), "no network namespaces of pods");
        assert!(look("nslookup kubernetes.default.svc.cluster.local").contains("10.96.0.1"), "no names");
    }
}

#[test]
fn the_api_server_keeps_custom_resources_and_takes_only_those_that_fit_their_schema() {
    let cluster = Cluster;
    let field = json!({"type": "object", "additionalProperties": {"type": "string"}});
    let schema = json!({"openAPIV3Schema": {"type": "object", "properties": {"spec": field}}});
    cluster.apply(&json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "samples.test.culvert.dev"},
        "spec": {
            "group": "test.culvert.dev",
            "scope": "Namespaced",
            "names": {"plural": "samples", "singular": "sample", "kind": "Sample"},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": schema}],
        },
    }));
    cluster.wait_condition("", "crd/samples.test.culvert.dev", "Established");
    let sample = |spec| json!({"apiVersion": "test.culvert.dev/v1", "kind": "Sample", "metadata": {"name": "one"}, "spec": spec});
    cluster.apply(&sample(json!({"b": "2", "a": "1"})));
    assert_eq!(cluster.get("default", "sample", "one")["spec"], json!({"a": "1", "b": "2"}));
    let refused = cluster.try_apply(&sample(json!({"a": 1})).to_string()).expect_err("a number is no string");
    assert!(refused.contains("spec.a"), "{refused}");
    cluster.kubectl(&["delete", "crd", "samples.test.culvert.dev"]);
}
