//! Small servers and clients, each on a thread in a pod's namespace: applications that know nothing of a mesh.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::{Mesh, Namespace, Pod, PodSpec, eventually};

/// How long an application waits for bytes.
pub const PATIENCE: Duration = Duration::from_secs(8);

/// What a client saw of its conversation with an [`echo`] server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The client's own address, as it sees it.
    pub local: SocketAddr,
    /// The server's address, as the client sees it.
    pub peer: SocketAddr,
    /// The client's address, as the server saw it. Never IPv4-mapped.
    pub client: SocketAddr,
}

/// A client and a server in the mesh, on two nodes or, where the mesh is to be [in the kernel](Mesh::in_the_kernel), on one; the server
/// [`echo`]es on `port`, where the client has reached it.
///
/// # Panics
/// When the client does not reach it.
pub fn pair(mesh: &mut Mesh, port: u16) -> (Pod, Pod) {
    let in_shop = |name, node| PodSpec { name, namespace: "shop", node, enrolled: true };
    let server = mesh.pod(in_shop("server", if mesh.in_the_kernel() { 0 } else { 1 }));
    let client = mesh.pod(in_shop("client", 0));
    if mesh.in_the_kernel() {
        await_verdict(mesh, &client, &server, port);
    }
    self::server(&server.netns, port, echo);
    eventually("the server is reached", || converse(&client.netns, server.at(false, port), "warm").is_ok());
    (client, server)
}

/// Waits until connections of a pod of the first node to a port of another pod there stay in the kernel, in both families. Nobody may listen
/// on the port yet.
///
/// # Panics
/// When somebody does, or they do not in time.
pub fn await_verdict(mesh: &Mesh, client: &Pod, server: &Pod, port: u16) {
    let listener = server.netns.run(move || listener(port));
    for v6 in [false, true] {
        eventually("the kernel has a verdict", || {
            let before = mesh.outcome(0, "admitted_same_node");
            connect(&client.netns, server.at(v6, port)).is_ok() && mesh.outcome(0, "admitted_same_node") > before
        });
    }
    drop(listener);
}

/// Listens in the pod, on both families, before it returns; `serve` gets each connection on a thread of its own.
///
/// # Panics
/// When the port is taken.
pub fn server(pod: &Namespace, port: u16, serve: impl Fn(TcpStream) + Clone + Send + 'static) {
    accept(pod.run(move || listener(port)), serve);
}

/// Hands each connection to `serve`, on a thread of its own.
pub fn accept(listener: TcpListener, serve: impl Fn(TcpStream) + Clone + Send + 'static) {
    std::thread::spawn(move || {
        // A connection that was reset in the queue is no reason to leave the others there.
        for stream in listener.incoming() {
            let Ok(stream) = stream.inspect_err(|error| eprintln!("accept: {error}")) else { continue };
            let serve = serve.clone();
            std::thread::spawn(move || serve(stream));
        }
    });
}

/// A server whose connections `serve` reports about, each with what it returns.
pub fn reporting<T: Send + 'static>(
    pod: &Namespace,
    port: u16,
    serve: impl Fn(TcpStream) -> T + Clone + Send + 'static,
) -> Receiver<T> {
    let (report, reports) = channel();
    server(pod, port, move |stream| {
        // A test that has seen enough listens no more.
        let _nobody_listens = report.send(serve(stream));
    });
    reports
}

/// Listens on both families, in the namespace of this thread.
///
/// # Panics
/// When the port is taken.
#[must_use]
pub fn listener(port: u16) -> TcpListener {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP)).expect("a socket");
    socket.set_reuse_address(true).expect("an option");
    socket.set_only_v6(false).expect("an option");
    socket.bind(&SocketAddr::from(([0_u16; 8], port)).into()).expect("a free port");
    socket.listen(4096).expect("a listener");
    socket.into()
}

/// Tells the client's address on a line, then sends back what comes, and ends when the client has.
pub fn echo(mut stream: TcpStream) {
    let Ok(mut client) = stream.peer_addr() else { return };
    client.set_ip(client.ip().to_canonical());
    let _gone = writeln!(stream, "{client}");
    let Ok(mut reader) = stream.try_clone() else { return };
    let _gone = io::copy(&mut reader, &mut stream);
}

/// Connects from the pod.
///
/// # Errors
/// As the application sees it.
pub fn connect(pod: &Namespace, to: SocketAddr) -> io::Result<TcpStream> {
    pod.run(move || {
        let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    })
}

/// Connects to an [`echo`] server, and reads the line that it begins with.
///
/// # Errors
/// As the application sees it; an early end is [`io::ErrorKind::UnexpectedEof`].
pub fn open(pod: &Namespace, to: SocketAddr) -> io::Result<TcpStream> {
    let mut stream = connect(pod, to)?;
    let mut byte = [0];
    while byte != *b"\n" {
        stream.read_exact(&mut byte)?;
    }
    Ok(stream)
}

/// Says something over a connection that [`open`] made, and reads it back.
///
/// # Errors
/// As the application sees it; an early end is [`io::ErrorKind::UnexpectedEof`].
///
/// # Panics
/// When something else comes back.
pub fn ping(mut stream: &TcpStream) -> io::Result<()> {
    let mut answer = [0; 4];
    stream.write_all(b"ping")?;
    stream.read_exact(&mut answer)?;
    assert_eq!(&answer, b"ping");
    Ok(())
}

/// Says `marker` to an [`echo`] server and reads it back.
///
/// # Errors
/// As the application sees it; an early end is [`io::ErrorKind::UnexpectedEof`].
pub fn converse(pod: &Namespace, to: SocketAddr, marker: &str) -> io::Result<Seen> {
    converse_over(connect(pod, to)?, marker)
}

/// The same over a connection that is there.
///
/// # Errors
/// As the application sees it; an early end is [`io::ErrorKind::UnexpectedEof`].
pub fn converse_over(mut stream: TcpStream, marker: &str) -> io::Result<Seen> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let (local, peer) = (stream.local_addr()?, stream.peer_addr().map_err(|error| cause(&stream, error))?);
    stream.write_all(marker.as_bytes())?;
    stream.shutdown(std::net::Shutdown::Write).map_err(|error| cause(&stream, error))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (client, echoed) = answer.split_once('\n').ok_or(io::ErrorKind::UnexpectedEof)?;
    if echoed != marker {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let client = client.parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(Seen { local, peer, client })
}

/// What ended a connection that is none any more.
fn cause(stream: &TcpStream, error: io::Error) -> io::Error {
    let told = if error.kind() == io::ErrorKind::NotConnected { stream.take_error().ok().flatten() } else { None };
    told.unwrap_or(error)
}

/// Ends a connection by a reset.
///
/// # Panics
/// When the socket is none.
pub fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("an option");
    drop(stream);
}

/// Waits until the kernel says that the connection has broken, reading nothing; false when it does not within `patience`.
///
/// # Panics
/// When the kernel does not poll.
#[must_use]
pub fn breaks(stream: &TcpStream, patience: Duration) -> bool {
    // Errors are told unasked.
    let mut polled = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    let timeout = PollTimeout::try_from(patience).expect("some seconds");
    poll(&mut polled, timeout).expect("a socket polls");
    polled[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR))
}
