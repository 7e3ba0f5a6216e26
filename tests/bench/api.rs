//! A real API server with the objects of a large cluster and nothing that acts on them: no kubelets, no schedulers, no controllers.
//! All of it is in a network namespace of its own, and removed when dropped.

pub(crate) mod agents;
pub(crate) mod objects;
mod pki;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use http::{Method, Request};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::Value;

use harness::Namespace;

use crate::interrupt;

/// Where everything listens. The API server tells others no address of the loopback's.
pub(crate) const ADDRESS: &str = "10.78.0.1";
const ETCD: &str = "http://127.0.0.1:2379";
const SERVICES: &str = "10.96.0.0/16";
const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
/// The directory of Kubernetes' programs, which `cargo xtask bench` has built.
const PROGRAMS: &str = "CULVERT_KUBERNETES";
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(20);

/// An API server that runs.
#[derive(Debug)]
pub(crate) struct Api {
    /// Ended before what they are in.
    programs: Vec<Running>,
    pub(crate) namespace: Namespace,
    directory: PathBuf,
}

/// A program that is ended when this is dropped.
#[derive(Debug)]
pub(crate) struct Running(Child);

impl Api {
    /// Starts etcd and the API server, and waits until that is ready.
    pub(crate) fn start() -> Result<Self> {
        let programs = std::env::var_os(PROGRAMS).map(PathBuf::from);
        let programs = programs.with_context(|| format!("{PROGRAMS} names no directory: run `cargo xtask bench`"))?;
        let id = format!("cvapi{}", std::process::id());
        let directory = PathBuf::from("/run/culvert-test").join(&id);
        fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
        let namespace = Namespace::new(&id);
        namespace.ip("link add br0 type bridge");
        namespace.ip(&format!("addr add {ADDRESS}/24 dev br0"));
        namespace.ip("link set br0 up");
        namespace.ip(&format!("route add default via {ADDRESS}"));
        let mut api = Self { programs: Vec::new(), namespace, directory };
        pki::make(&api.directory)?;
        let mut etcd = api.command("etcd");
        etcd.arg("--data-dir").arg(api.path("etcd")).args(["--listen-client-urls", ETCD, "--advertise-client-urls", ETCD]);
        etcd.args(["--listen-peer-urls", "http://127.0.0.1:2380", "--unsafe-no-fsync"]);
        let etcd = api.run(etcd, "etcd")?;
        api.programs.push(etcd);
        let server = api.run(api.api_server(&programs), "kube-apiserver")?;
        api.programs.push(server);
        Ok(api)
    }

    /// The kubeconfig of somebody who may do everything.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.path(pki::KUBECONFIG)
    }

    /// A file of this cluster's.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// A program to be run beside the API server.
    pub(crate) fn command(&self, program: &str) -> Command {
        self.namespace.command(program)
    }

    /// Starts a program, which ends when what is given is dropped. What it says goes to a file.
    pub(crate) fn run(&self, mut command: Command, name: &str) -> Result<Running> {
        let log = File::create(self.path(&format!("{name}.log")))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        Ok(Running(command.spawn().with_context(|| format!("starting {name}"))?))
    }

    fn api_server(&self, programs: &Path) -> Command {
        let mut command = self.command(&programs.join("kube-apiserver").display().to_string());
        let file = |name: &str| self.path(name).display().to_string();
        command.args([
            format!("--etcd-servers={ETCD}"),
            format!("--bind-address={ADDRESS}"),
            format!("--advertise-address={ADDRESS}"),
            format!("--tls-cert-file={}", file(pki::SERVER_CERTIFICATE)),
            format!("--tls-private-key-file={}", file(pki::SERVER_KEY)),
            format!("--client-ca-file={}", file(pki::ROOT)),
            format!("--service-account-key-file={}", file(pki::ACCOUNTS_PUBLIC)),
            format!("--service-account-signing-key-file={}", file(pki::ACCOUNTS_KEY)),
            format!("--service-account-issuer={ISSUER}"),
            format!("--service-cluster-ip-range={SERVICES}"),
            "--authorization-mode=RBAC".to_owned(),
            // Nobody makes the Secrets that this one waits for.
            "--disable-admission-plugins=ServiceAccount".to_owned(),
        ]);
        command
    }
}

impl Running {
    /// Its process. The program that enters the namespace becomes it.
    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ended_already = self.0.kill();
        let _status = self.0.wait();
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        self.programs.clear();
        // The agent's programs are pinned on a mount in it.
        harness::mesh::clear(&self.directory);
    }
}

/// A client that has what the kubeconfig gives it. To be called in the API server's network namespace; waits until it serves.
pub(crate) async fn connect(kubeconfig: &Path) -> Result<Client> {
    let config = Kubeconfig::read_from(kubeconfig).context("reading the kubeconfig")?;
    let config = Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
    let client = Client::try_from(config)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        interrupt::check()?;
        match client.request_text(Request::get("/readyz").body(Vec::new())?).await {
            Ok(answer) if answer == "ok" => return Ok(client),
            other => ensure!(Instant::now() < deadline, "the API server does not get ready: {other:?}"),
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Sends an object, and gives the answer.
pub(crate) async fn send(client: &Client, method: Method, path: &str, object: &Value) -> Result<Value> {
    let media_type = if method == Method::PATCH { "application/merge-patch+json" } else { "application/json" };
    let request = Request::builder().method(method.clone()).uri(path).header("content-type", media_type);
    let request = request.body(object.to_string().into_bytes())?;
    let answer = client.request_text(request).await.with_context(|| format!("{method} {path}"))?;
    serde_json::from_str(&answer).with_context(|| format!("the answer to {method} {path}"))
}
