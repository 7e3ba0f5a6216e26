//! A whole controller, spoken to as agents do: over TLS, with a token.

mod certificates;
mod discovery;
mod hostile;
mod lifecycle;
mod on_kubernetes;
mod versions;
mod wire;

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use prost::Message;
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
use rustls::{ClientConfig, RootCertStore};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::http::Uri;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};

use super::{ControllerConfig, RunningController, SourceConfig, start};
use crate::proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use crate::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource};
use crate::proto::workload::{Address, Workload, address};

const NODES: &str = "
apiVersion: v1
kind: Node
metadata: {name: node-a}
spec: {podCIDR: 10.1.0.0/24, podCIDRs: [10.1.0.0/24, 'fd00:1::/64']}
---
apiVersion: v1
kind: Node
metadata: {name: node-b}
spec: {podCIDR: 10.2.0.0/24}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {culvert.dev/mesh: enabled}}
";

/// A running controller, its directories, and what speaks to it.
struct Mesh {
    manifests: TempDir,
    state: TempDir,
    running: Option<RunningController>,
}

/// A client's discovery stream.
struct Discovery {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

/// A pod's manifest.
fn pod(name: &str, node: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{app: {name}}}}}\n\
         spec: {{nodeName: {node}, serviceAccountName: {name}, containers: []}}\nstatus: {{podIP: {ip}, phase: Running}}\n"
    )
}

fn config(manifests: &Path, state: &Path) -> ControllerConfig {
    ControllerConfig {
        source: SourceConfig::Manifests { manifests: manifests.to_owned(), state_dir: state.to_owned() },
        listen: "127.0.0.1:0".parse().unwrap(),
        trust_domain: "cluster.local".parse().unwrap(),
        cert_ttl: Duration::from_secs(3600),
        default_deny: false,
        same_node: crate::model::SameNode::Kernel,
        cluster_ranges: Vec::new(),
        root_namespace: "istio-system".to_owned(),
        cluster_domain: "cluster.local".to_owned(),
    }
}

impl Mesh {
    async fn start(files: &[(&str, String)]) -> Self {
        let mut mesh = Self { manifests: TempDir::new().unwrap(), state: TempDir::new().unwrap(), running: None };
        mesh.write("nodes.yaml", NODES);
        for (name, content) in files {
            mesh.write(name, content);
        }
        mesh.restart().await;
        mesh
    }

    /// Stops the controller, if it runs, and starts one on the same directories.
    async fn restart(&mut self) {
        if let Some(running) = self.running.take() {
            running.stop().await.unwrap();
        }
        self.running = Some(start(config(self.manifests.path(), self.state.path())).await.unwrap());
    }

    fn write(&self, name: &str, content: &str) {
        fs::write(self.manifests.path().join(name), content).unwrap();
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.manifests.path().join(name)).unwrap();
    }

    fn address(&self) -> SocketAddr {
        self.running.as_ref().unwrap().address()
    }

    fn token(&self, node: &str) -> String {
        fs::read_to_string(self.state.path().join("tokens").join(node)).unwrap()
    }

    fn root(&self) -> CertificateDer<'static> {
        CertificateDer::from_pem_file(self.state.path().join("root-cert.pem")).unwrap()
    }

    fn tls(&self) -> TlsConnector {
        connector(self.root())
    }

    /// A connection whose server was verified by its address.
    async fn channel(&self) -> Channel {
        channel(self.address(), self.root()).await
    }

    fn authorized<T>(&self, node: &str, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let token = format!("Bearer {}", self.token(node)).parse().unwrap();
        request.metadata_mut().insert("authorization", token);
        request
    }

    async fn discovery(&self, node: &str) -> Discovery {
        Discovery::open(self.channel().await, |request| self.authorized(node, request)).await
    }
}

fn connector(root: CertificateDer<'static>) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(root).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    TlsConnector::from(Arc::new(config))
}

/// A connection whose server was verified by its address.
async fn channel(address: SocketAddr, root: CertificateDer<'static>) -> Channel {
    let tls = connector(root);
    let connector = Connector(Arc::new(move || {
        let tls = tls.clone();
        Box::pin(async move {
            let socket = TcpStream::connect(address).await?;
            Ok(TokioIo::new(tls.connect(ServerName::from(address.ip()), socket).await?))
        })
    }));
    Endpoint::from_static("http://controller").connect_with_connector(connector).await.unwrap()
}

type Requests = ReceiverStream<DeltaDiscoveryRequest>;

impl Discovery {
    async fn open(channel: Channel, authorize: impl Fn(Requests) -> Request<Requests>) -> Self {
        let (requests, receiver) = mpsc::channel(16);
        let mut client = AggregatedDiscoveryServiceClient::new(channel);
        let responses = client.delta_aggregated_resources(authorize(ReceiverStream::new(receiver))).await.unwrap().into_inner();
        Self { requests, responses }
    }

    async fn ask(&self, type_url: &str, subscribe: &[&str], held: &[(String, String)]) {
        let request = DeltaDiscoveryRequest {
            node: Some(Node { id: "test-agent".to_owned(), ..Node::default() }),
            type_url: type_url.to_owned(),
            resource_names_subscribe: subscribe.iter().map(ToString::to_string).collect(),
            initial_resource_versions: held.iter().cloned().collect(),
            ..DeltaDiscoveryRequest::default()
        };
        self.requests.send(request).await.unwrap();
    }

    async fn next(&mut self) -> Result<DeltaDiscoveryResponse, Status> {
        let next = tokio::time::timeout(Duration::from_secs(20), self.responses.message());
        let response = next.await.expect("an answer in time")?;
        Ok(response.expect("the stream goes on"))
    }

    /// Subscribes to all of a type, and gives the resources of the whole first answer, and what is gone.
    async fn all(&mut self, type_url: &str, held: &[(String, String)]) -> (Vec<Resource>, Vec<String>) {
        self.ask(type_url, &["*"], held).await;
        let (mut resources, mut removed) = (Vec::new(), Vec::new());
        loop {
            let response = self.next().await.unwrap();
            assert_eq!(response.type_url, type_url);
            resources.extend(response.resources);
            removed.extend(response.removed_resources);
            if response.system_version_info != "partial" {
                return (resources, removed);
            }
        }
    }
}

fn workload(resource: &Resource) -> Workload {
    let address = Address::decode(resource.resource.as_ref().unwrap().value.as_slice()).unwrap();
    match address.r#type.unwrap() {
        address::Type::Workload(workload) => workload,
        address::Type::Service(service) => panic!("{} is a service", service.name),
    }
}

fn names(resources: &[Resource]) -> Vec<&str> {
    resources.iter().map(|resource| resource.name.as_str()).collect()
}

type Io = TokioIo<tokio_rustls::client::TlsStream<TcpStream>>;
type Dialling = std::pin::Pin<Box<dyn Future<Output = std::io::Result<Io>> + Send>>;

#[derive(Clone)]
struct Connector(Arc<dyn Fn() -> Dialling + Send + Sync>);

impl tonic::codegen::Service<Uri> for Connector {
    type Response = Io;
    type Error = std::io::Error;
    type Future = Dialling;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), std::io::Error>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Dialling {
        (self.0)()
    }
}
