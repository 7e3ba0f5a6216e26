//! Traffic that goes on in a pod while something happens to the cluster, and what became of it.

use serde_json::Value;

use super::pod::PodSpec;
use super::{Cluster, kubectl, run};

/// A second of traffic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Second {
    /// How many new connections served.
    pub served: u64,
    /// How many did not.
    pub failed: u64,
    /// Why the first of those did not.
    pub failure: Option<String>,
    /// How often the connection that is kept was used until then.
    pub kept_used: u64,
    /// Why it cannot be used any more.
    pub kept_failure: Option<String>,
}

impl Cluster {
    /// Starts traffic to a server from a new pod, and waits until it flows.
    pub fn start_traffic(&self, namespace: &str, name: &str, node: &str, server: &str, say: &str) {
        let mut pod = PodSpec::new(namespace, name, node);
        let arguments = ["traffic", server, "--say", say, "--every", "50"];
        pod.arguments = &arguments;
        // What a pod says before it is enrolled is refused: the connection that is to be kept, too.
        let reached = ["connect", server, "--retry-for", "60"];
        pod.more = serde_json::json!({"initContainers": [{"name": "first", "image": super::IMAGE, "args": reached}]});
        self.pods(&[pod]);
        crate::eventually("traffic flows", || self.traffic(namespace, name).iter().any(|second| second.served > 0));
    }

    /// The traffic of a pod until now.
    ///
    /// # Panics
    /// When it does not tell.
    #[must_use]
    pub fn traffic(&self, namespace: &str, pod: &str) -> Vec<Second> {
        let told = run(kubectl().args(["--namespace", namespace, "logs", pod, "--container=app"]), "").expect("traffic tells");
        let read = |line: &str| {
            let told: Value = serde_json::from_str(line).ok()?;
            let text = |value: &Value| value.as_str().map(str::to_owned);
            Some(Second {
                served: told["served"].as_u64()?,
                failed: told["failed"].as_u64()?,
                failure: text(&told["failure"]),
                kept_used: told["kept"]["used"].as_u64()?,
                kept_failure: text(&told["kept"]["failure"]),
            })
        };
        told.lines().filter_map(read).collect()
    }

    /// Waits until so many more seconds of traffic have passed, and gives them.
    ///
    /// # Panics
    /// When traffic has stopped.
    #[must_use]
    pub fn next_traffic(&self, namespace: &str, pod: &str, seconds: usize) -> Vec<Second> {
        let before = self.traffic(namespace, pod).len();
        let mut all = Vec::new();
        crate::eventually_within(super::PATIENCE, "traffic goes on", || {
            std::thread::sleep(std::time::Duration::from_millis(200));
            all = self.traffic(namespace, pod);
            all.len() >= before + seconds
        });
        all.split_off(before)
    }
}
