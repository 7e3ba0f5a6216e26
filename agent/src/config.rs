//! The agent's configuration, checked before anything starts.
//!
//! Enters: the values of the command line. Leaves: one [`AgentConfig`] that the rest can rely on, or an error that names the flag,
//! the value and the way out. Files that are named may not exist yet: an agent starts before its controller, its pods or its
//! token, in any order, and waits.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::observe::log::LogFormat;
use crate::tunnel::TunnelForm;

/// The controller's port where the address names none.
pub const CONTROLLER_PORT: u16 = 15012;
/// Where the admin interface listens by default: it has no authentication, so nobody but the node itself reaches it.
pub const ADMIN_LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 15000);
/// Where metrics are served by default: scrapers come from other pods.
pub const METRICS_LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 15020);
/// Where readiness is served by default: the kubelet asks on the node's address.
pub const READY_LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 15021);

/// How the agent is to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentConfig {
    /// The node's name, as the cluster knows it.
    pub node: String,
    /// Where the controller is: configuration and certificates.
    pub controller: ControllerAddress,
    /// PEM file of the roots that the controller's own certificate is checked against. Read again when it changes.
    pub root_cert: PathBuf,
    /// The token that proves the node to the controller. Read anew for each connection: it is rotated.
    pub token_file: PathBuf,
    /// Where the container runtime keeps the pods' network namespaces.
    pub netns_dir: PathBuf,
    /// The root of the cgroup v2 tree; none: found from the mounts.
    pub cgroup_root: Option<PathBuf>,
    /// Kubernetes namespaces whose pods never join.
    pub excluded_namespaces: Vec<String>,
    /// By what names a kubelet runs on the node.
    pub kubelet_names: Vec<String>,
    /// Where programs and maps are pinned, on a BPF file system.
    pub bpf_dir: PathBuf,
    /// Where what the controller tells is kept for the node's next agent.
    pub state_dir: PathBuf,
    /// Where metrics are served.
    pub metrics_listen: SocketAddr,
    /// Where readiness is served.
    pub ready_listen: SocketAddr,
    /// Where the admin interface is served.
    pub admin_listen: SocketAddr,
    /// How log lines are written.
    pub log_format: LogFormat,
    /// Which forms of tunnels are offered and taken.
    pub tunnel_form: TunnelForm,
    /// Threads that move bytes, at least 1.
    pub workers: usize,
    /// How long open connections may go on after the agent was told to stop.
    pub drain_timeout: Duration,
}

/// The controller's address: `https://HOST[:PORT]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControllerAddress {
    host: String,
    port: u16,
}

/// Why a configuration is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A node's name is a DNS name.
    #[error(
        "--node: `{0}` is not a node's name: use 1 to 253 letters, digits, '-', '_' and '.', as `kubectl get nodes` shows it"
    )]
    Node(String),
    /// The controller's address has another form.
    #[error("`{value}` is not the address of a controller ({why}): write https://HOST:PORT, such as https://controller:15012")]
    Controller {
        /// What was given.
        value: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Two servers can't share an address.
    #[error("{first} and {second} are both {addr}: give one of them another port")]
    SameAddress {
        /// A flag.
        first: &'static str,
        /// Another flag.
        second: &'static str,
        /// The address of both.
        addr: SocketAddr,
    },
    /// A path is empty.
    #[error("{0}: the path is empty")]
    EmptyPath(&'static str),
    /// A directory was given where a file is needed.
    #[error("{flag}: `{}` is a directory: name the file", path.display())]
    Directory {
        /// The flag.
        flag: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// No listening address.
    #[error(
        "`{0}` is not an address to listen on: write IP:PORT, such as 127.0.0.1:15000 or [::]:15020, or :PORT for all addresses"
    )]
    Listen(String),
    /// No duration.
    #[error("`{0}` is not a duration of at most 24h: write a number and ms, s, m or h, such as 10s")]
    Duration(String),
    /// A certificate that is never valid.
    #[error("`{0}` is no life for a certificate: write a longer one, such as 24h")]
    Lifetime(String),
}

impl AgentConfig {
    /// Checks what the single values can't show.
    ///
    /// # Errors
    /// [`ConfigError`] for the first thing that is wrong.
    pub fn validate(self) -> Result<Self, ConfigError> {
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if self.node.is_empty() || self.node.len() > 253 || !self.node.bytes().all(legal) {
            return Err(ConfigError::Node(self.node));
        }
        let servers = [
            ("--metrics-listen", self.metrics_listen),
            ("--ready-listen", self.ready_listen),
            ("--admin-listen", self.admin_listen),
        ];
        for (index, (first, addr)) in servers.iter().enumerate() {
            if let Some((second, _)) = servers[index + 1..].iter().find(|(_, other)| collide(*addr, *other)) {
                return Err(ConfigError::SameAddress { first, second, addr: *addr });
            }
        }
        for (flag, path) in [("--root-cert", &self.root_cert), ("--token-file", &self.token_file)] {
            if path.is_dir() {
                return Err(ConfigError::Directory { flag, path: path.clone() });
            }
        }
        let paths = [
            ("--root-cert", Some(&self.root_cert)),
            ("--token-file", Some(&self.token_file)),
            ("--netns-dir", Some(&self.netns_dir)),
            ("--cgroup-root", self.cgroup_root.as_ref()),
            ("--bpf-dir", Some(&self.bpf_dir)),
            ("--state-dir", Some(&self.state_dir)),
        ];
        let empty = paths.into_iter().find(|(_, path)| path.is_some_and(|path| path.as_os_str().is_empty()));
        if let Some((flag, _)) = empty {
            return Err(ConfigError::EmptyPath(flag));
        }
        Ok(self)
    }
}

/// Whether two servers can't both listen: the same port on the same address, or one of them on all addresses.
fn collide(a: SocketAddr, b: SocketAddr) -> bool {
    let overlap = a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified();
    a.port() != 0 && a.port() == b.port() && overlap
}

impl ControllerAddress {
    /// The host: a DNS name or an IP address, IPv6 without brackets. Also the name that its certificate must carry.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl FromStr for ControllerAddress {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let error = |why| ConfigError::Controller { value: text.to_owned(), why };
        let uri: http::Uri = text.parse().map_err(|_invalid| error("not a URL"))?;
        if uri.scheme() != Some(&http::uri::Scheme::HTTPS) {
            return Err(error("the scheme must be https: the controller is spoken to over TLS only"));
        }
        let authority = uri.authority().ok_or_else(|| error("no host"))?;
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(error("a path or query has no meaning here"));
        }
        if authority.as_str().contains('@') {
            return Err(error("a user has no meaning here"));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        if host.is_empty() {
            return Err(error("no host"));
        }
        let after_host = &authority.as_str()[authority.host().len()..];
        let port = match after_host.strip_prefix(':') {
            None => CONTROLLER_PORT,
            Some(port) => port.parse().ok().filter(|port| *port != 0).ok_or_else(|| error("no such port"))?,
        };
        Ok(Self { host, port })
    }
}

impl fmt::Display for ControllerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "https://[{}]:{}", self.host, self.port),
            false => write!(f, "https://{}:{}", self.host, self.port),
        }
    }
}

/// Reads an address to listen on: `IP:PORT`, or `:PORT` for every IPv4 address.
///
/// # Errors
/// [`ConfigError::Listen`].
pub fn parse_listen(text: &str) -> Result<SocketAddr, ConfigError> {
    let full = if text.starts_with(':') { format!("0.0.0.0{text}") } else { text.to_owned() };
    full.parse().map_err(|_invalid| ConfigError::Listen(text.to_owned()))
}

/// Reads a duration: a whole number and `ms`, `s`, `m` or `h`. At most 24 h, lest a stop never ends.
///
/// # Errors
/// [`ConfigError::Duration`].
pub fn parse_duration(text: &str) -> Result<Duration, ConfigError> {
    let error = || ConfigError::Duration(text.to_owned());
    let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(error)?;
    let number: u64 = text[..digits].parse().map_err(|_invalid| error())?;
    let unit = match &text[digits..] {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(error()),
    };
    let millis = number.checked_mul(unit).filter(|millis| *millis <= 24 * 3_600_000).ok_or_else(error)?;
    Ok(Duration::from_millis(millis))
}

/// Reads the life of a certificate: a duration that is not zero.
///
/// # Errors
/// [`ConfigError::Duration`] and [`ConfigError::Lifetime`].
pub fn parse_lifetime(text: &str) -> Result<Duration, ConfigError> {
    parse_duration(text).and_then(|life| if life.is_zero() { Err(ConfigError::Lifetime(text.to_owned())) } else { Ok(life) })
}

#[cfg(test)]
mod tests;
