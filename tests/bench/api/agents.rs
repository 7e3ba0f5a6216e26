//! Agents that do nothing: each keeps the stream of one node's, with that node's token, and acknowledges what it is told. Since all are
//! told the same, one of them remembers for all what they hold. What they are told, and when, is counted.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use culvert::proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use culvert::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use culvert::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE, MESH_TYPE, packed};
use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Request;
use tonic::transport::Endpoint;

const TYPES: [&str; 3] = [MESH_TYPE, AUTHORIZATION_TYPE, ADDRESS_TYPE];
/// The mark on a response that is not the last of a first answer.
const PARTIAL: &str = "partial";
const LARGEST: usize = 32 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
/// How long an agent waits before it connects again, at first and at most.
const LEAST_WAIT: Duration = Duration::from_millis(200);
const MOST_WAIT: Duration = Duration::from_secs(15);

/// What an agent tells.
#[derive(Debug)]
pub(crate) enum Told {
    /// The agent of this number has the first answers of all types, with so many resources.
    Everything(usize, usize),
    /// A resource has changed.
    Changed(String, Instant),
    /// A stream has ended.
    Lost(String),
}

/// The versions of what is held, by type and name.
type Held = BTreeMap<String, HashMap<String, String>>;

/// Many agents.
#[derive(Debug)]
pub(crate) struct Agents {
    told: mpsc::UnboundedReceiver<Told>,
    count: usize,
    /// What has come over their connections, as TCP has it.
    received: Arc<AtomicU64>,
    /// How many streams have ended.
    lost: usize,
}

impl Agents {
    /// Connects an agent for each of these tokens to the controller at `to`, which the roots vouch for. To be called in the
    /// controller's network namespace.
    pub(crate) fn connect(to: SocketAddr, roots: &str, tokens: Vec<String>) -> Result<Self> {
        let mut store = RootCertStore::empty();
        for root in CertificateDer::pem_slice_iter(roots.as_bytes()) {
            store.add(root.context("a root")?)?;
        }
        let mut tls = ClientConfig::builder().with_root_certificates(store).with_no_client_auth();
        tls.alpn_protocols = vec![b"h2".to_vec()];
        let (tell, told) = mpsc::unbounded_channel();
        let received = Arc::new(AtomicU64::new(0));
        let dial = Dial { to, tls: TlsConnector::from(Arc::new(tls)), received: Arc::clone(&received) };
        let (count, held) = (tokens.len(), Arc::new(Mutex::new(Held::new())));
        for (number, token) in tokens.into_iter().enumerate() {
            let mut agent =
                Agent { number, token, knows_all: false, dial: dial.clone(), held: Arc::clone(&held), tell: tell.clone() };
            tokio::spawn(async move { agent.run().await });
        }
        Ok(Self { told, count, received, lost: 0 })
    }

    /// Waits until all have been told everything. Gives the number of resources that the one was told that was told the most.
    pub(crate) async fn all_told(&mut self) -> Result<usize> {
        let (mut told, mut most) = (BTreeSet::new(), 0);
        while told.len() < self.count {
            if let Told::Everything(agent, resources) = self.next().await? {
                told.insert(agent);
                most = most.max(resources);
            }
        }
        Ok(most)
    }

    /// Waits until all have heard of this resource. Gives when the last one had.
    pub(crate) async fn all_heard(&mut self, name: &str) -> Result<Instant> {
        let (mut heard, mut last) = (0, None);
        while heard < self.count {
            match self.next().await? {
                Told::Changed(changed, at) if changed == name => {
                    heard += 1;
                    last = last.max(Some(at));
                }
                Told::Changed(..) => {}
                Told::Everything(..) | Told::Lost(_) => bail!("a stream ended while a change was waited for"),
            }
        }
        last.context("there is no agent")
    }

    /// What they have received by now, in bytes.
    pub(crate) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// How many streams have ended by now.
    pub(crate) fn lost(&self) -> usize {
        self.lost
    }

    async fn next(&mut self) -> Result<Told> {
        crate::interrupt::check()?;
        let told = tokio::time::timeout(PATIENCE, self.told.recv()).await;
        let told = told.context("the agents hear nothing")?.context("all agents have ended")?;
        if let Told::Lost(why) = &told {
            if self.lost == 0 {
                eprintln!("        {why}; it connects again, and so do others");
            }
            self.lost += 1;
        }
        Ok(told)
    }
}

/// One of them.
struct Agent {
    number: usize,
    token: String,
    /// Everything was told once; from then on only what differs is.
    knows_all: bool,
    dial: Dial,
    held: Arc<Mutex<Held>>,
    tell: mpsc::UnboundedSender<Told>,
}

impl Agent {
    /// Follows until nobody listens. As real ones do it: a controller may be busy, or gone for a moment.
    async fn run(&mut self) {
        let mut wait = LEAST_WAIT;
        loop {
            let known = self.knows_all;
            let Err(error) = self.follow().await;
            if self.tell.send(Told::Lost(format!("agent {}: {error:#}", self.number))).is_err() {
                return;
            }
            if self.knows_all != known {
                wait = LEAST_WAIT;
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(MOST_WAIT);
        }
    }

    async fn follow(&mut self) -> Result<std::convert::Infallible> {
        let channel =
            Endpoint::from_shared(format!("https://{}", self.dial.to))?.connect_with_connector(self.dial.clone()).await?;
        let (requests, outgoing) = mpsc::channel(64);
        let mut request = Request::new(ReceiverStream::new(outgoing));
        request.metadata_mut().insert("authorization", format!("Bearer {}", self.token).parse()?);
        for type_url in TYPES {
            let node = Some(Node { id: format!("node-{}", self.number), ..Node::default() });
            let initial_resource_versions = self.versions(type_url);
            requests
                .send(DeltaDiscoveryRequest {
                    node,
                    type_url: type_url.to_owned(),
                    initial_resource_versions,
                    ..Default::default()
                })
                .await?;
        }
        let mut client = AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(LARGEST);
        let mut responses = client.delta_aggregated_resources(request).await?.into_inner();
        let (mut open, mut resources) = (TYPES.len(), 0);
        while let Some(response) = responses.message().await? {
            let at = Instant::now();
            self.note(&response);
            if open > 0 {
                resources += response.resources.len();
                if response.system_version_info != PARTIAL {
                    open -= 1;
                    if open == 0 {
                        self.knows_all = true;
                        self.tell.send(Told::Everything(self.number, resources))?;
                    }
                }
            } else {
                for resource in response.resources {
                    self.tell.send(Told::Changed(resource.name, at))?;
                }
            }
            let (type_url, response_nonce) = (response.type_url, response.nonce);
            requests.send(DeltaDiscoveryRequest { type_url, response_nonce, ..Default::default() }).await?;
        }
        bail!("the controller ended the stream")
    }

    fn versions(&self, type_url: &str) -> HashMap<String, String> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(held) = held.get(type_url).filter(|_| self.knows_all) else { return HashMap::new() };
        [(packed::NAME.to_owned(), packed::pack(held.values().filter_map(|version| packed::digest_of(version))))].into()
    }

    /// Remembers for all what they hold.
    fn note(&self, response: &DeltaDiscoveryResponse) {
        if self.number > 0 {
            return;
        }
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let held = held.entry(response.type_url.clone()).or_default();
        for name in &response.removed_resources {
            held.remove(name);
        }
        held.extend(response.resources.iter().map(|resource| (resource.name.clone(), resource.version.clone())));
    }
}

/// The way to the controller.
#[derive(Clone)]
struct Dial {
    to: SocketAddr,
    tls: TlsConnector,
    received: Arc<AtomicU64>,
}

impl tower_service::Service<Uri> for Dial {
    type Response = TokioIo<TlsStream<Counted>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _uri: Uri) -> Self::Future {
        let Self { to, tls, received } = self.clone();
        Box::pin(async move {
            let stream = TcpStream::connect(to).await?;
            stream.set_nodelay(true)?;
            Ok(TokioIo::new(tls.connect(ServerName::from(to.ip()), Counted { stream, received }).await?))
        })
    }
}

/// A connection whose incoming bytes are counted.
struct Counted {
    stream: TcpStream,
    received: Arc<AtomicU64>,
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        self.received.fetch_add((buffer.filled().len() - before) as u64, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
