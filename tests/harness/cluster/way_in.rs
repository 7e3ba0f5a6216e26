//! A way into the cluster's network: a port of this machine's loopback whose connections go out from a pod, byte by byte. With it the
//! tests' own clients, honest and not, stand where that pod does, and need nothing of the machine that the tests run on.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Stdio;
use std::thread;

use super::{Cluster, kubectl};

impl Cluster {
    /// Gives an address of loopback, connections to which go from this pod to `host` and `port`, for as long as the test runs.
    ///
    /// # Panics
    /// When loopback has no port.
    #[must_use]
    pub fn way_from(&self, namespace: &str, pod: &str, host: &str, port: u16) -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port of loopback");
        let address = listener.local_addr().expect("a listener has an address");
        let port = port.to_string();
        let words = ["--namespace", namespace, "exec", "--stdin", pod, "--", "nc", host, &port].map(str::to_owned);
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let words = words.clone();
                thread::spawn(move || {
                    if let Err(error) = carry(client, &words) {
                        eprintln!("{}: {error}", words.join(" "));
                    }
                });
            }
        });
        address
    }
}

fn carry(mut client: TcpStream, words: &[String]) -> io::Result<()> {
    let mut far = kubectl().args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let (mut input, mut output) = (far.stdin.take().expect("a piped input"), far.stdout.take().expect("a piped output"));
    let mut said = client.try_clone()?;
    let talk = thread::spawn(move || copy(&mut said, &mut input));
    let heard = copy(&mut output, &mut client);
    // The far end has ended: so does this one, whatever it still has to say.
    let _ended_already = client.shutdown(Shutdown::Both);
    let _the_same = talk.join();
    far.wait()?;
    heard
}

/// As `io::copy`, which would splice here: that waits for the socket's next bytes with the pipe locked, and who is to read the last ones waits
/// for that.
fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut bytes = vec![0; 1 << 14];
    loop {
        match from.read(&mut bytes)? {
            0 => return Ok(()),
            read => to.write_all(&bytes[..read])?,
        }
    }
}
