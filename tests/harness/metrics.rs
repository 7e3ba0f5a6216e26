//! What an agent says to Prometheus, read as text.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// A page of metrics.
#[derive(Clone, Debug)]
pub struct Metrics(String);

impl Metrics {
    /// Fetches the page from this namespace.
    ///
    /// # Errors
    /// When it is not served in full.
    pub fn fetch(from: SocketAddr) -> io::Result<Self> {
        let page = get(from, "/metrics")?;
        if page.trim_end().ends_with("# EOF") { Ok(Self(page)) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// The sum of the series of this name that carry all of these labels, each written `name="value"`.
    #[must_use]
    pub fn sum(&self, name: &str, labels: &[&str]) -> u64 {
        let matching = self.0.lines().filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            let found = series.split('{').next() == Some(name) && labels.iter().all(|label| series.contains(label));
            found.then(|| value.parse::<f64>().ok()).flatten()
        });
        matching.sum::<f64>() as u64
    }

    /// The lines of the series of this name.
    pub fn series<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.lines().filter(move |line| line.split(['{', ' ']).next() == Some(name))
    }

    /// How many series there are of this name.
    #[must_use]
    pub fn count(&self, name: &str) -> usize {
        self.series(name).count()
    }
}

/// Fetches a page, head and all, over HTTP.
///
/// # Errors
/// When nobody serves it.
pub fn get(from: SocketAddr, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(from)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "GET {path} HTTP/1.0\r\nhost: agent\r\n\r\n")?;
    let mut page = String::new();
    stream.read_to_string(&mut page)?;
    Ok(page)
}
