//! What the agents know, by their admin pages.

use serde_json::Value;

use crate::eventually;
use crate::mesh::{Mesh, NODES};

impl Mesh {
    /// A page of the admin interface of a node's agent, read as JSON.
    ///
    /// # Panics
    /// When it is not served, or is something else.
    #[must_use]
    pub fn view(&self, node: usize, path: &'static str) -> Value {
        let page = self.admin(node, path);
        let (_, body) = page.split_once("\r\n\r\n").expect("a head and a body");
        serde_json::from_str(body).expect("the admin interface speaks JSON")
    }

    /// What the agent of a node knows of the workload of this name; nothing when it knows none.
    #[must_use]
    pub fn workload(&self, node: usize, name: &str) -> Value {
        let all = self.view(node, "/workloads");
        all.as_array().into_iter().flatten().find(|workload| workload["name"] == name).cloned().unwrap_or_default()
    }

    /// Waits until both agents know a policy of this name, beside whatever else they know.
    ///
    /// # Panics
    /// When that does not come to pass in time.
    pub fn await_policy_beside(&self, applied: &str) {
        for (node, name) in NODES.iter().enumerate() {
            eventually(&format!("{name} knows the policy {applied}"), || {
                let all = self.view(node, "/policies");
                all.as_array().into_iter().flatten().any(|policy| policy["name"] == applied)
            });
        }
    }

    /// Waits until both agents know a policy, and no other of its namespace: `applied` names it, or nothing.
    ///
    /// # Panics
    /// When that does not come to pass in time.
    pub fn await_policy(&self, namespace: &str, applied: Option<&str>) {
        for (node, name) in NODES.iter().enumerate() {
            eventually(&format!("{name} knows the policies {applied:?}"), || {
                let all = self.view(node, "/policies");
                let of_namespace = all.as_array().into_iter().flatten().filter(|policy| policy["namespace"] == namespace);
                of_namespace.filter_map(|policy| policy["name"].as_str()).eq(applied)
            });
        }
    }
}
