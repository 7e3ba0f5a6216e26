//! gRPC's health protocol (`grpc.health.v1.Health/Check`), for kubelet's probes: a server that is always well, and a client.

use std::net::TcpListener;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{HeaderMap, Request, Response};
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Runtime};

/// A message of gRPC: not compressed, two bytes long, whose first field says SERVING.
const SERVING: &[u8] = &[0, 0, 0, 0, 2, 0x08, 1];
/// The empty request, which asks for the server as a whole.
const WHOLE_SERVER: &[u8] = &[0, 0, 0, 0, 0];

/// Serves for ever.
pub(crate) fn serve(listener: TcpListener) {
    if let Err(error) = runtime().and_then(|runtime| runtime.block_on(accept(listener))) {
        eprintln!("gRPC: {error:#}");
    }
}

/// Asks once.
pub(crate) fn check(server: &str) -> Result<()> {
    runtime()?.block_on(async {
        let stream = TcpStream::connect(server).await.with_context(|| format!("connecting to {server}"))?;
        let (mut client, connection) = h2::client::handshake(stream).await?;
        tokio::spawn(connection);
        let request = Request::post(format!("http://{server}/grpc.health.v1.Health/Check"));
        let request = request.header("content-type", "application/grpc").header("te", "trailers").body(())?;
        let (response, mut body) = client.send_request(request, false)?;
        body.send_data(Bytes::from_static(WHOLE_SERVER), true)?;
        let mut answer = response.await?.into_body();
        let mut message = Vec::new();
        while let Some(data) = answer.data().await {
            message.extend_from_slice(&data?);
        }
        ensure!(message == SERVING, "the server's health is {message:?}");
        Ok(())
    })
}

fn runtime() -> Result<Runtime> {
    Ok(Builder::new_current_thread().enable_io().build()?)
}

async fn accept(listener: TcpListener) -> Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(async {
            if let Err(error) = answer(stream).await {
                eprintln!("gRPC: {error:#}");
            }
        });
    }
}

async fn answer(stream: TcpStream) -> Result<()> {
    let mut connection = h2::server::handshake(stream).await?;
    while let Some(request) = connection.accept().await {
        let (request, respond) = request?;
        tokio::spawn(async {
            if let Err(error) = say_serving(request.into_body(), respond).await {
                eprintln!("gRPC: {error:#}");
            }
        });
    }
    Ok(())
}

/// Answers a question when it has been put: an answer to half a question is one to a stream that is reset.
async fn say_serving(mut question: RecvStream, mut respond: SendResponse<Bytes>) -> Result<()> {
    while let Some(data) = question.data().await {
        question.flow_control().release_capacity(data?.len())?;
    }
    let head = Response::builder().header("content-type", "application/grpc").body(())?;
    let mut body = respond.send_response(head, false)?;
    body.send_data(Bytes::from_static(SERVING), false)?;
    body.send_trailers(HeaderMap::from_iter([("grpc-status".parse()?, "0".parse()?)]))?;
    Ok(())
}
