//! The cluster's certificate authority, the certificates of its programs, and the kubeconfigs that name them. They last for a month: a
//! test cluster does not.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::node::Node;
use super::{Cluster, network};

/// Those who speak to the API server, beside the nodes: the file's name, and who it makes them.
const CLIENTS: [(&str, &str); 6] = [
    ("admin", "/O=system:masters/CN=admin"),
    ("controller-manager", "/CN=system:kube-controller-manager"),
    ("scheduler", "/CN=system:kube-scheduler"),
    ("proxy", "/CN=system:kube-proxy"),
    ("apiserver-kubelet-client", "/O=system:masters/CN=kube-apiserver-kubelet-client"),
    ("front-proxy-client", "/CN=front-proxy-client"),
];

/// Makes what the control plane needs.
pub(super) fn make(cluster: &Cluster) -> Result<()> {
    fs::create_dir_all(directory(cluster))?;
    // The request's own defaults would add extensions twice.
    fs::write(directory(cluster).join("openssl.cnf"), "[req]\ndistinguished_name=name\n[name]\n")?;
    let authority = ["basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign,digitalSignature"];
    certificate(cluster, "ca", "/CN=culvert-test-cluster", &authority, false)?;
    let names = "DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:localhost,IP:127.0.0.1";
    let names = format!("{names},IP:{},IP:{}", network::CONTROL_PLANE_ADDR, network::API_SERVICE);
    issue(cluster, "apiserver", "/CN=kube-apiserver", "serverAuth", Some(&names))?;
    for (name, subject) in CLIENTS {
        issue(cluster, name, subject, "clientAuth", None)?;
        inner_kubeconfig(cluster, name)?;
    }
    let key = directory(cluster).join("service-accounts.key");
    openssl(Command::new("openssl").args(["genrsa", "-out"]).arg(&key).arg("2048"))?;
    openssl(Command::new("openssl").args(["rsa", "-pubout", "-in"]).arg(&key).arg("-out").arg(key.with_extension("pub")))
}

/// Makes what a node's kubelet needs.
pub(super) fn make_node(node: &Node<'_>) -> Result<()> {
    let (cluster, name) = (node.cluster(), node.name());
    let subject = format!("/O=system:nodes/CN=system:node:{name}");
    issue(cluster, &name, &subject, "serverAuth,clientAuth", Some(&format!("DNS:{name},IP:{}", node.address())))?;
    inner_kubeconfig(cluster, &name)
}

/// A file of somebody's: `crt`, `key` or `kubeconfig`.
pub(super) fn file(cluster: &Cluster, name: &str, extension: &str) -> PathBuf {
    directory(cluster).join(format!("{name}.{extension}"))
}

fn inner_kubeconfig(cluster: &Cluster, name: &str) -> Result<()> {
    let server = format!("https://{}:6443", network::CONTROL_PLANE_ADDR);
    kubeconfig(cluster, name, &file(cluster, name, "kubeconfig"), &server)
}

/// Writes a kubeconfig by which somebody reaches a server. It names files, so it is of use on this machine and on the nodes only.
pub(super) fn kubeconfig(cluster: &Cluster, name: &str, path: &Path, server: &str) -> Result<()> {
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "culvert",
        "contexts": [{"name": "culvert", "context": {"cluster": "culvert", "user": name}}],
        "clusters": [{"name": "culvert", "cluster": {"server": server, "certificate-authority": file(cluster, "ca", "crt")}}],
        "users": [{"name": name, "user": {
            "client-certificate": file(cluster, name, "crt"),
            "client-key": file(cluster, name, "key"),
        }}],
    });
    fs::write(path, format!("{config:#}")).with_context(|| format!("writing {}", path.display()))
}

fn directory(cluster: &Cluster) -> PathBuf {
    cluster.path("pki")
}

fn issue(cluster: &Cluster, name: &str, subject: &str, usage: &str, names: Option<&str>) -> Result<()> {
    let usage = format!("extendedKeyUsage={usage}");
    let names = names.map(|names| format!("subjectAltName={names}"));
    let mut extensions = vec!["basicConstraints=CA:FALSE", "keyUsage=digitalSignature,keyEncipherment", &usage];
    extensions.extend(names.as_deref());
    certificate(cluster, name, subject, &extensions, true)
}

fn certificate(cluster: &Cluster, name: &str, subject: &str, extensions: &[&str], signed: bool) -> Result<()> {
    let mut command = Command::new("openssl");
    command.args(["req", "-x509", "-config"]).arg(directory(cluster).join("openssl.cnf"));
    command.args(["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30", "-subj", subject]);
    command.arg("-keyout").arg(file(cluster, name, "key")).arg("-out").arg(file(cluster, name, "crt"));
    if signed {
        command.arg("-CA").arg(file(cluster, "ca", "crt")).arg("-CAkey").arg(file(cluster, "ca", "key"));
    }
    for extension in extensions {
        command.args(["-addext", extension]);
    }
    openssl(&mut command)
}

fn openssl(command: &mut Command) -> Result<()> {
    let output = command.output().context("starting openssl")?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
