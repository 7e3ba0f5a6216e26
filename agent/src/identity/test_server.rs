//! A controller for tests: any gRPC services over real TLS on loopback, with the files that prove either side to the other.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::service::Routes;
use tonic::{Request, Status};

use super::channel::ControllerEndpoint;
use super::provider::provider;
use super::test_authority::TestAuthority;

pub(crate) struct TestServer {
    task: AbortOnDropHandle<()>,
    address: SocketAddr,
    pub(crate) root: PathBuf,
    pub(crate) token: PathBuf,
    pub(crate) directory: tempfile::TempDir,
}

impl TestServer {
    pub(crate) async fn start(services: Routes) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let authority = TestAuthority::new("root");
        let (root, token) = (directory.path().join("root.pem"), directory.path().join("token"));
        std::fs::write(&root, authority.root_pem()).expect("written");
        std::fs::write(&token, "secret\n").expect("written");
        let issued = authority.leaf("").address(Ipv4Addr::LOCALHOST.into()).issue();
        let mut tls = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(issued.chain.clone(), issued.key.clone_key())
            .expect("a matching key");
        tls.alpn_protocols = vec![b"h2".to_vec()];
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let task = AbortOnDropHandle::new(tokio::spawn(serve(listener, TlsAcceptor::from(Arc::new(tls)), services)));
        Self { task, address, root, token, directory }
    }

    pub(crate) fn endpoint(&self) -> ControllerEndpoint {
        self.endpoint_with(&self.root, &self.token)
    }

    pub(crate) fn endpoint_with(&self, root: &Path, token: &Path) -> ControllerEndpoint {
        ControllerEndpoint::new(&format!("https://{}", self.address), root, token).expect("a legal address")
    }

    /// Closes the port and all connections.
    pub(crate) async fn stop(&mut self) {
        self.task.abort();
        // The port is closed when the task's own end has been seen.
        let _aborted = (&mut self.task).await;
    }
}

/// Refuses requests without the token of [`TestServer`]'s file.
pub(crate) fn authenticate<T>(request: &Request<T>) -> Result<(), Status> {
    match request.metadata().get("authorization").map(|token| token.as_bytes()) {
        Some(b"Bearer secret") => Ok(()),
        Some(_) | None => Err(Status::unauthenticated("no such token")),
    }
}

/// Takes TLS off each connection and hands it to the gRPC server.
async fn serve(listener: TcpListener, acceptor: TlsAcceptor, services: Routes) {
    let (connections, incoming) = mpsc::channel(8);
    let accept = async {
        let mut pumps = tokio::task::JoinSet::new();
        while let Ok((tcp, _)) = listener.accept().await {
            let (acceptor, connections) = (acceptor.clone(), connections.clone());
            pumps.spawn(async move {
                let Ok(mut tls) = acceptor.accept(tcp).await else { return };
                let (mut near, far) = tokio::io::duplex(1 << 16);
                if connections.send(Ok::<_, std::io::Error>(far)).await.is_ok() {
                    let _end = tokio::io::copy_bidirectional(&mut tls, &mut near).await;
                }
            });
        }
    };
    let server = tonic::transport::Server::builder().add_routes(services).serve_with_incoming(ReceiverStream::new(incoming));
    let _ends = tokio::join!(accept, server);
}
