//! Small servers and clients, each on a thread in a pod's namespace: applications that know nothing of a mesh.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

use crate::Namespace;

/// How long an application waits for bytes.
const PATIENCE: Duration = Duration::from_secs(8);

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

/// Listens in the pod, on both families, before it returns; `serve` gets each connection on a thread of its own.
///
/// # Panics
/// When the port is taken.
pub fn server(pod: &Namespace, port: u16, serve: fn(TcpStream)) {
    let listener = pod.run(move || -> TcpListener {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP)).expect("a socket");
        socket.set_reuse_address(true).expect("an option");
        socket.set_only_v6(false).expect("an option");
        socket.bind(&SocketAddr::from(([0_u16; 8], port)).into()).expect("a free port");
        socket.listen(4096).expect("a listener");
        socket.into()
    });
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || serve(stream));
        }
    });
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

/// Says `marker` to an [`echo`] server and reads it back.
///
/// # Errors
/// As the application sees it; an early end is [`io::ErrorKind::UnexpectedEof`].
pub fn converse(pod: &Namespace, to: SocketAddr, marker: &str) -> io::Result<Seen> {
    let mut stream = connect(pod, to)?;
    let (local, peer) = (stream.local_addr()?, stream.peer_addr()?);
    stream.write_all(marker.as_bytes())?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (client, echoed) = answer.split_once('\n').ok_or(io::ErrorKind::UnexpectedEof)?;
    if echoed != marker {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let client = client.parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(Seen { local, peer, client })
}
