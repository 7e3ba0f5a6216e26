//! Nodes, by what the API knows of them.

use serde_json::Value;

use super::Finding;
use super::node::{KERNEL_FLOOR, version};
use crate::installation::cluster::ObjectRef;

/// What of each Linux node keeps an agent from running there.
pub(super) fn check(nodes: &[Value]) -> Vec<Finding> {
    let linux: Vec<&Value> = nodes.iter().filter(|node| info(node, "operatingSystem") != "windows").collect();
    let mut findings: Vec<Finding> = linux.iter().flat_map(|node| wrong(node)).collect();
    if findings.is_empty() {
        findings.push(Finding::ok("nodes", format!("{} nodes have a kernel and a processor that agents run on", linux.len())));
    }
    findings
}

fn wrong(node: &Value) -> Vec<Finding> {
    let name = ObjectRef::of(node).name;
    let mut findings = Vec::new();
    let (release, processor) = (info(node, "kernelVersion"), info(node, "architecture"));
    if version(release).is_some_and(|version| version < KERNEL_FLOOR) {
        let (major, minor) = KERNEL_FLOOR;
        let message = format!("node {name} runs Linux {release}, older than {major}.{minor}");
        findings.push(Finding::error(
            "nodes",
            message,
            "use a newer kernel there, or keep agents off it with agent.nodeSelector",
        ));
    }
    if !matches!(processor, "amd64" | "arm64" | "") {
        let message = format!("node {name} is of the architecture {processor}, which there is no image for");
        findings.push(Finding::error("nodes", message, "keep agents off it with agent.nodeSelector"));
    }
    findings
}

fn info<'a>(node: &'a Value, name: &str) -> &'a str {
    node["status"]["nodeInfo"][name].as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::diagnosis::{Severity, worst};

    #[test]
    fn old_kernels_and_other_processors_are_errors() {
        let node = |kernel: &str, processor: &str, os: &str| {
            let info = json!({"kernelVersion": kernel, "architecture": processor, "operatingSystem": os});
            json!({"metadata": {"name": "n"}, "status": {"nodeInfo": info}})
        };
        let check = |kernel, processor, os| worst(&super::check(&[node(kernel, processor, os)]));
        assert_eq!(check("6.1.0-18-amd64", "amd64", "linux"), Severity::Ok);
        assert_eq!(check("5.10.0", "arm64", "linux"), Severity::Error);
        assert_eq!(check("6.1.0", "s390x", "linux"), Severity::Error);
        assert_eq!(check("10.0.17763", "amd64", "windows"), Severity::Ok);
    }
}
