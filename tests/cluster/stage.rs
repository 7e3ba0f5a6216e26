//! What is watched while something happens to the cluster: traffic between two pods of the mesh, on two nodes, and the wire between.

use harness::Cluster;
use harness::cluster::{ENROLLED, NodeCapture, PodSpec, Second, TestNamespace};

/// A namespace of the mesh that takes nothing else, with a server on the second node, traffic to it from the first, and a capture
/// between.
pub(crate) struct Stage {
    pub(crate) namespace: TestNamespace,
    pub(crate) nodes: Vec<String>,
    pub(crate) server: String,
    pub(crate) marker: String,
    /// None: the API server, through which it is asked, has been away.
    pub(crate) capture: Option<NodeCapture>,
}

impl Stage {
    /// With a server that is one pod.
    pub(crate) fn new(name: &str) -> Self {
        Self::with(name, |nodes| format!("{}:8080", Cluster.pods(&[PodSpec::new(name, "server", &nodes[1])])[0]))
    }

    /// With a server that is made for it in the namespace of that name.
    pub(crate) fn with(name: &str, server: impl FnOnce(&[String]) -> String) -> Self {
        let cluster = Cluster;
        let nodes = cluster.nodes();
        let namespace = cluster.namespace(name, &[ENROLLED]);
        cluster.mode(name, "STRICT");
        let server = server(&nodes);
        let capture = Some(cluster.capture(&nodes[0]));
        let marker = format!("the-secret-of-{name}");
        cluster.start_traffic(name, "traffic", &nodes[0], &server, &marker);
        Self { namespace, nodes, server, marker, capture }
    }

    pub(crate) fn next(&self, seconds: usize) -> Vec<Second> {
        Cluster.next_traffic(self.namespace.name(), "traffic", seconds)
    }

    /// Each new connection serves, and the one that is kept does.
    pub(crate) fn check_traffic(&self, seconds: usize) {
        check(&self.next(seconds));
    }

    /// A pod that is made now is served in the end.
    pub(crate) fn check_new_pod(&self, name: &str, node: usize) {
        let namespace = self.namespace.name();
        Cluster.pods(&[PodSpec::new(namespace, name, &self.nodes[node])]);
        Cluster.converse_within(namespace, name, &self.server, &self.marker, 20).expect("a new pod is served");
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if !std::thread::panicking()
            && let Some(capture) = &mut self.capture
        {
            assert!(!capture.shows(&self.marker), "something was said in the clear");
            assert!(capture.flows().iter().any(|flow| flow.tls), "the capture sees nothing");
        }
    }
}

/// Nothing failed in any of these.
pub(crate) fn check(seconds: &[Second]) {
    for second in seconds {
        assert!(second.served > 0 && second.failed == 0 && second.kept_failure.is_none(), "{seconds:#?}");
    }
}
