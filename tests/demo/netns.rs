//! Network namespaces by name, as `ip netns` keeps them, and what is done inside of them.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::sched::{CloneFlags, setns};

/// How long a request to an agent may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// Where `ip netns` keeps a namespace.
pub(crate) fn path(name: &str) -> PathBuf {
    Path::new("/run/netns").join(name)
}

/// Runs `ip` with these words, to success.
pub(crate) fn ip(words: &str) -> Result<()> {
    let output = Command::new("ip").args(words.split(' ')).stdin(Stdio::null()).output().context("starting ip")?;
    ensure!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// A program that will run inside.
pub(crate) fn command(namespace: &str, program: &str) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", path(namespace).display())).args(["--", program]).stdin(Stdio::null());
    command
}

/// What a thread does inside. What it opens there stays there.
pub(crate) fn inside<T: Send>(namespace: &str, act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let file = File::open(path(namespace)).with_context(|| format!("opening the network namespace {namespace}"))?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("entering {namespace}"))?;
            act()
        });
        thread.join().map_err(|_panic| anyhow!("the thread in {namespace} panicked"))?
    })
}

/// The body of an answer over HTTP.
pub(crate) fn http_get(namespace: &str, server: SocketAddr, path: &str) -> Result<String> {
    let answer = inside(namespace, || {
        let mut stream = TcpStream::connect_timeout(&server, REQUEST_TIMEOUT)?;
        stream.set_read_timeout(Some(REQUEST_TIMEOUT))?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: {server}\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
    if head.split(' ').nth(1) != Some("200") {
        bail!("{server}{path}: {}", head.lines().next().unwrap_or_default());
    }
    Ok(body.to_owned())
}
