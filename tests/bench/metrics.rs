//! What an agent says of itself.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};

use anyhow::{Context as _, Result, ensure};

use harness::Namespace;

/// The page of an agent at `path`, an error if its status is not 200.
pub(crate) fn get(node: &Namespace, port: u16, path: &str) -> Result<String> {
    let request = format!("GET {path} HTTP/1.0\r\nHost: agent\r\n\r\n");
    let answer = node.run(move || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))?;
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })?;
    let (head, page) = answer.split_once("\r\n\r\n").context("no answer of HTTP")?;
    ensure!(head.starts_with("HTTP/1.0 200"), "{path}: {}", head.lines().next().unwrap_or_default());
    Ok(page.to_owned())
}

/// The value of one series of an agent's; 0 while there is none.
pub(crate) fn value(node: &Namespace, series: &str) -> Result<f64> {
    let page = get(node, 15020, "/metrics")?;
    let value = page.lines().find_map(|line| line.strip_prefix(series)).map(str::trim);
    value.map_or(Ok(0.0), |value| value.parse().with_context(|| format!("{series} is {value}")))
}
