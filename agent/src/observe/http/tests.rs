use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::super::connection::fixtures::{exposition, info};
use super::super::readiness::{self, Readiness};
use super::*;

/// A server on a free port of the loopback address that stops when it is dropped.
pub(crate) struct Serving {
    pub(crate) addr: SocketAddr,
    _stop: tokio_util::sync::DropGuard,
}

pub(crate) async fn serve(router: Router) -> Serving {
    let server = Server::admin(SocketAddr::from(([127, 0, 0, 1], 0))).await.expect("a free port");
    let (addr, stop) = (server.addr(), CancellationToken::new());
    tokio::spawn(server.serve(router, stop.clone()));
    Serving { addr, _stop: stop.drop_guard() }
}

/// Status, head and body of the answer to `method path`.
pub(crate) async fn ask(addr: SocketAddr, method: &str, path: &str) -> (u16, String, String) {
    let mut stream = TcpStream::connect(addr).await.expect("a connection");
    let request = format!("{method} {path} HTTP/1.0\r\nHost: test\r\nContent-Length: 0\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let status = head.split(' ').nth(1).expect("a status").parse().expect("a number");
    (status, head.to_ascii_lowercase(), body.to_owned())
}

#[tokio::test]
async fn metrics_are_served_under_both_paths_as_openmetrics() {
    let observer = Observer::new("node-a");
    let _open = observer.open(info());
    let serving = serve(metrics_router(observer)).await;
    for path in ["/metrics", "/stats/prometheus"] {
        let (status, head, body) = ask(serving.addr, "GET", path).await;
        assert_eq!(status, 200);
        assert!(head.contains(&format!("content-type: {CONTENT_TYPE}")), "{head}");
        assert!(body.contains("istio_tcp_connections_opened_total{"));
    }
}

/// An observer of so many pairs of workloads that their page takes many pieces, more than sockets hold.
fn of_many() -> Observer {
    let observer = Observer::new("node-a");
    for number in 0..5_000 {
        let mut pair = info();
        let source = Arc::make_mut(pair.source.as_mut().expect("a source"));
        Arc::make_mut(&mut source.telemetry).workload = Some(format!("cart-{number}").as_str().into());
        drop(observer.open(pair));
    }
    observer
}

#[tokio::test]
async fn a_page_of_many_pieces_arrives_whole() {
    let observer = of_many();
    let expected = exposition(&observer);
    let serving = serve(metrics_router(observer)).await;
    let (status, _, body) = ask(serving.addr, "GET", "/metrics").await;
    assert_eq!(status, 200);
    let sorted = |page: &str| page.lines().map(str::to_owned).collect::<std::collections::BTreeSet<_>>();
    assert!(body.ends_with("# EOF\n") && body.len() == expected.len() && sorted(&body) == sorted(&expected));
}

#[tokio::test]
async fn a_client_that_does_not_read_its_page_holds_up_nobody() {
    let observer = of_many();
    let serving = serve(metrics_router(observer.clone())).await;
    let mut stalled = TcpStream::connect(serving.addr).await.expect("a connection");
    stalled.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await.expect("sent");
    stalled.read_u8().await.expect("the page has begun");
    let mut stranger = info();
    stranger.source = None;
    drop(observer.open(stranger));
    observer.metrics().policy_verdict(Some("shop/new"), "allow", false);
    let (_, _, page) = ask(serving.addr, "GET", "/metrics").await;
    assert!(page.contains("policy=\"shop/new\"") && page.contains("source_workload=\"unknown\""));
}

#[tokio::test]
async fn readiness_is_503_until_all_conditions_are_met() {
    let readiness = Readiness::new();
    let condition = readiness.condition("controller");
    let serving = serve(readiness::router(readiness)).await;
    let (status, _, body) = ask(serving.addr, "GET", "/healthz/ready").await;
    assert_eq!((status, body.as_str()), (503, "not ready\ncontroller: not yet\n"));
    condition.met();
    assert_eq!(ask(serving.addr, "GET", "/healthz/ready").await.0, 200);
}

#[tokio::test]
async fn an_address_that_is_taken_is_an_error_that_names_it() {
    let first = Server::metrics(SocketAddr::from(([127, 0, 0, 1], 0))).await.expect("a free port");
    let error = anyhow::Error::from(Server::metrics(first.addr()).await.expect_err("taken"));
    let addr = first.addr();
    let expected =
        format!("cannot listen on {addr} for metrics: choose another address with --metrics-listen: Address already in use");
    assert!(format!("{error:#}").starts_with(&expected), "{error:#}");
}

#[tokio::test]
async fn clients_beyond_the_bound_wait_and_are_served_in_their_turn() {
    let serving = serve(Router::new().route("/", get(async || "here"))).await;
    let mut idle = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        let mut stream = TcpStream::connect(serving.addr).await.expect("a connection");
        stream.write_all(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n").await.expect("sent");
        stream.read_u8().await.expect("an answer: the place is taken");
        idle.push(stream);
    }
    let waiting = tokio::spawn(ask(serving.addr, "GET", "/"));
    let early = tokio::time::timeout(Duration::from_millis(50), async {
        while !waiting.is_finished() {
            tokio::task::yield_now().await
        }
    });
    assert!(early.await.is_err(), "a client was served beyond the bound");
    idle.pop();
    assert_eq!(waiting.await.expect("no panic").0, 200);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_says_nothing_is_cut_off() {
    let serving = serve(Router::new().route("/", get(async || "here"))).await;
    let mut stream = TcpStream::connect(serving.addr).await.expect("a connection");
    let read = stream.read(&mut [0; 1]).await;
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
}
