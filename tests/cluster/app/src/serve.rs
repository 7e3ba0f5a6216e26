//! Servers: one that tells who its client is and then sends back what comes, one for HTTP, one for gRPC's health protocol.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{grpc, pause};

/// Where to serve what.
#[derive(Debug, clap::Args)]
pub(crate) struct Ports {
    /// Echo.
    #[arg(long, default_value_t = 8080)]
    echo: u16,
    /// HTTP.
    #[arg(long, default_value_t = 8081)]
    http: u16,
    /// gRPC's health protocol.
    #[arg(long, default_value_t = 8082)]
    grpc: u16,
    /// For how many seconds to go on with what has begun once it is told to end, and to refuse what is new.
    #[arg(long, default_value_t = 0)]
    linger: u64,
}

/// Serves until it is told to end.
pub(crate) fn run(ports: &Ports) -> Result<()> {
    let end = pause::block_end()?;
    let grpc = listen(ports.grpc)?;
    let listeners = [each_connection(ports.echo, echo)?, each_connection(ports.http, http)?, grpc.try_clone()?];
    thread::spawn(move || grpc::serve(grpc));
    println!("{}", serde_json::json!({"serving": [ports.echo, ports.http, ports.grpc]}));
    end.wait()?;
    for listener in listeners {
        Socket::from(listener).shutdown(Shutdown::Both)?;
    }
    thread::sleep(Duration::from_secs(ports.linger));
    Ok(())
}

fn each_connection(port: u16, serve: fn(TcpStream) -> io::Result<()>) -> Result<TcpListener> {
    let listener = listen(port)?;
    let served = listener.try_clone()?;
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || {
                if let Err(error) = serve(stream) {
                    eprintln!("port {port}: {error}");
                }
            });
        }
    });
    Ok(served)
}

/// Listens on both families where there are two.
fn listen(port: u16) -> Result<TcpListener> {
    let listen = |address: SocketAddr| -> io::Result<TcpListener> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        if address.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        socket.bind(&address.into())?;
        socket.listen(4096)?;
        Ok(socket.into())
    };
    let both = listen(([0_u16; 8], port).into()).or_else(|_no_ipv6| listen(([0, 0, 0, 0], port).into()));
    both.with_context(|| format!("listening on port {port}"))
}

/// Tells the client's address on a line, then sends back what comes, and ends when the client has.
fn echo(mut stream: TcpStream) -> io::Result<()> {
    writeln!(stream, "{}", client(&stream)?)?;
    let mut reader = stream.try_clone()?;
    io::copy(&mut reader, &mut stream)?;
    Ok(())
}

/// Answers a request with the client's address, whatever the request is.
fn http(mut stream: TcpStream) -> io::Result<()> {
    let client = client(&stream)?;
    let head = BufReader::new(stream.try_clone()?.take(1 << 16));
    for line in head.lines() {
        if line?.is_empty() {
            break;
        }
    }
    let body = format!("{client}\n");
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

fn client(stream: &TcpStream) -> io::Result<SocketAddr> {
    let mut client = stream.peer_addr()?;
    client.set_ip(client.ip().to_canonical());
    Ok(client)
}
