//! What a node's programs read, and how they are started.

use std::ffi::OsString;
use std::fs;

use anyhow::Result;
use serde_json::{Value, json};

use super::node::{Node, words};
use super::runtime::Runtime;
use super::{network, options, pki};

/// Writes the configuration of each program.
pub(super) fn write(node: &Node<'_>) -> Result<()> {
    for directory in ["cni", "kubelet", "tmp"] {
        fs::create_dir_all(node.path(directory))?;
    }
    let file = |name: &str, value: Value| fs::write(node.path(name), format!("{value:#}"));
    Runtime::of(node.cluster()).configure(node)?;
    file("kubelet.yaml", kubelet(node))?;
    file("kube-proxy.yaml", kube_proxy(node))?;
    file("cni/10-pods.conflist", cni(node))?;
    Ok(())
}

/// A program with its arguments.
///
/// # Errors
/// When the program does not say what options it has.
pub(super) fn command_line(node: &Node<'_>, program: &str) -> Result<Vec<OsString>> {
    let kubeconfig = pki::file(node.cluster(), &node.name(), "kubeconfig");
    let runtime = Runtime::of(node.cluster());
    let mut words = match program {
        _ if program == runtime.program() => runtime.command_line(node),
        "kubelet" => words([
            &program,
            &"--config",
            &node.path("kubelet.yaml"),
            &"--kubeconfig",
            &kubeconfig,
            &"--container-runtime-endpoint",
            &runtime.endpoint(),
            &"--hostname-override",
            &node.name(),
            &"--node-ip",
            &node.address().to_string(),
            &"--v=2",
        ]),
        _ => words([&program, &"--config", &node.path(&format!("{program}.yaml"))]),
    };
    if program == "kubelet" {
        words.extend(options::kubelet(node.cluster())?.into_iter().map(OsString::from));
    }
    Ok(words)
}

/// Little waiting, no eviction: the disk is this machine's.
fn kubelet(node: &Node<'_>) -> Value {
    let cluster = node.cluster();
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": pki::file(cluster, "ca", "crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": pki::file(cluster, &node.name(), "crt"),
        "tlsPrivateKeyFile": pki::file(cluster, &node.name(), "key"),
        "cgroupDriver": "cgroupfs",
        "clusterDNS": [network::DNS_SERVICE],
        "clusterDomain": "cluster.local",
        "failSwapOn": false,
        "oomScoreAdj": 0,
        "resolvConf": "",
        "evictionHard": {"memory.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%"},
        "imageGCHighThresholdPercent": 100,
        "nodeStatusUpdateFrequency": "5s",
        // As of later versions: with this one's 5 a second, a node tells of one or two pods a second.
        "kubeAPIQPS": 50,
        "kubeAPIBurst": 100,
        "syncFrequency": "5s",
        "fileCheckFrequency": "5s",
        "volumeStatsAggPeriod": "0s",
    })
}

fn kube_proxy(node: &Node<'_>) -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": pki::file(node.cluster(), "proxy", "kubeconfig")},
        "mode": "iptables",
        "oomScoreAdj": 0,
        "clusterCIDR": network::PODS,
        "hostnameOverride": node.name(),
        "conntrack": {"maxPerCore": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    })
}

/// What kind's own plugin does: each pod on a link of its own to its node, which routes. So a service's address is translated for pods of
/// the same node, too, whatever the kernel does with bridges.
fn cni(node: &Node<'_>) -> Value {
    json!({
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [
            {
                "type": "ptp",
                "ipMasq": false,
                "mtu": 1500,
                "ipam": {
                    "type": "host-local",
                    "dataDir": "/run/cni-ipam",
                    "routes": [{"dst": "0.0.0.0/0"}],
                    "ranges": [[{"subnet": node.pods()}]],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
}
