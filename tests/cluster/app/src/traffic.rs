//! Traffic that goes on while something happens to the cluster: new connections all the time, and one that is kept and used. Each second
//! it tells how many of the new ones served and how many failed, why the first of those did, and what became of the one that is kept.

use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::json;

use crate::connect;

/// Which traffic.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// An echo server's name or address, and its port.
    server: String,
    /// What each connection says.
    #[arg(long, default_value = "ping")]
    say: String,
    /// Between two connections, in milliseconds.
    #[arg(long, default_value_t = 20)]
    every: u64,
    /// When to end; never, if it is not told.
    #[arg(long)]
    seconds: Option<u64>,
}

/// Goes on until it is time.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let mut kept = Kept::open(&arguments.server, &arguments.say);
    let started = Instant::now();
    for second in 0.. {
        if arguments.seconds.is_some_and(|seconds| second >= seconds) {
            break;
        }
        let (mut served, mut failed, mut failure) = (0_u32, 0_u32, None);
        while started.elapsed().as_secs() <= second {
            match exchange(&arguments.server, &arguments.say) {
                Ok(()) => served += 1,
                Err(error) => {
                    failed += 1;
                    failure.get_or_insert(format!("{:?}: {error}", error.kind()));
                }
            }
            kept.use_once(&arguments.say);
            std::thread::sleep(Duration::from_millis(arguments.every));
        }
        println!(
            "{}",
            json!({"second": second, "served": served, "failed": failed, "failure": failure,
            "kept": {"used": kept.used, "failure": kept.failure}})
        );
    }
    Ok(())
}

/// The connection that is kept. Once it has failed, it is not opened again.
struct Kept {
    stream: Option<TcpStream>,
    used: u64,
    failure: Option<String>,
}

impl Kept {
    fn open(server: &str, say: &str) -> Self {
        let mut kept = Self { stream: None, used: 0, failure: None };
        match connect::open(server).and_then(|mut stream| greet(&mut stream).map(|()| stream)) {
            Ok(stream) => kept.stream = Some(stream),
            Err(error) => kept.failure = Some(format!("opening: {error}")),
        }
        kept.use_once(say);
        kept
    }

    fn use_once(&mut self, say: &str) {
        let Some(stream) = &mut self.stream else { return };
        match echo(stream, say) {
            Ok(()) => self.used += 1,
            Err(error) => {
                self.failure = Some(format!("{:?}: {error}", error.kind()));
                self.stream = None;
            }
        }
    }
}

fn exchange(server: &str, say: &str) -> io::Result<()> {
    let mut stream = connect::open(server)?;
    greet(&mut stream)?;
    echo(&mut stream, say)
}

/// Reads the line that an echo server begins with.
fn greet(stream: &mut TcpStream) -> io::Result<()> {
    let mut byte = [0];
    while byte != [b'\n'] {
        stream.read_exact(&mut byte)?;
    }
    Ok(())
}

fn echo(stream: &mut TcpStream, say: &str) -> io::Result<()> {
    stream.write_all(say.as_bytes())?;
    let mut answer = vec![0; say.len()];
    stream.read_exact(&mut answer)?;
    if answer == say.as_bytes() { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}
