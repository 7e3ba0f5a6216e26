//! One connection: what is said, what is answered, and which addresses the application sees.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs as _};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::json;

/// How long an application waits for bytes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(8);

/// What to say to whom.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// A name or address, and a port.
    server: String,
    /// What to say, in which `\r` and `\n` mean what they mean in C.
    #[arg(long, default_value = "hello")]
    say: String,
    /// For how many seconds to try again after a failure. What fails in the end is told.
    #[arg(long, default_value_t = 0)]
    retry_for: u64,
}

/// Connects, and tells what it saw.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let say = arguments.say.replace("\\r", "\r").replace("\\n", "\n");
    let deadline = Instant::now() + Duration::from_secs(arguments.retry_for);
    let outcome = loop {
        let outcome = converse(&arguments.server, say.as_bytes());
        if outcome.is_ok() || Instant::now() >= deadline {
            break outcome;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    match outcome {
        Ok(seen) => {
            println!("{}", json!({"local": seen.local, "peer": seen.peer, "answer": seen.answer}));
            Ok(())
        }
        Err(error) => {
            println!("{}", json!({"error": format!("{:?}", error.kind())}));
            bail!("{}: {error}", arguments.server)
        }
    }
}

struct Seen {
    local: SocketAddr,
    peer: SocketAddr,
    answer: String,
}

fn converse(server: &str, say: &[u8]) -> io::Result<Seen> {
    let mut stream = open(server)?;
    let (local, peer) = (stream.local_addr()?, stream.peer_addr()?);
    stream.write_all(say)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    // A connection that ends without a word was refused by somebody on the way.
    if answer.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Seen { local, peer, answer })
}

/// Connects to the first address that answers.
pub(crate) fn open(server: &str) -> io::Result<TcpStream> {
    let mut failure = io::ErrorKind::NotFound.into();
    for address in server.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, PATIENCE) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE))?;
                return Ok(stream);
            }
            Err(error) => failure = error,
        }
    }
    Err(failure)
}
