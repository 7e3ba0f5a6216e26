//! The real programs: nginx and curl, as Debian has them, configured as if there were no mesh.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::lab::{Lab, namespace};
use crate::mesh::SERVICE;
use crate::netns;

/// What nginx answers with; nobody else says this.
pub(crate) const SECRET: &str = "the answer that only cart and web know";
/// The name of the service for web, which curl resolves without DNS.
const SERVICE_NAME: &str = "web.shop.svc.cluster.local";

/// A running nginx.
#[derive(Debug)]
pub(crate) struct Nginx {
    log: PathBuf,
}

impl Nginx {
    /// Starts nginx in a pod, or outside; it serves `/hello` and the files of `files`.
    pub(crate) fn start(lab: &Lab, place: &str, port: u16, files: &str) -> Result<Self> {
        let directory = lab.path(&format!("nginx-{place}"));
        fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
        let log = directory.join("requests.log");
        let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|name| format!("    {name}_temp_path {}/{name};\n", directory.display()))
            .concat();
        let configuration = format!(
            r#"user root;
worker_processes 1;
daemon off;
pid {directory}/pid;
error_log stderr warn;
events {{}}
http {{
{temporary}    log_format json escape=json '{{"client":"$remote_addr","port":$remote_port,"request":"$request","scheme":"$scheme","status":$status}}';
    access_log {log} json;
    default_type text/plain;
    server {{
        listen {port} reuseport;
        root {files};
        location = /hello {{ return 200 "{SECRET}: you are $remote_addr, and this is plain $scheme\n"; }}
    }}
}}
"#,
            directory = directory.display(),
            log = log.display(),
        );
        fs::write(directory.join("nginx.conf"), configuration)?;
        let mut command = netns::command(&namespace(place), "nginx");
        command.arg("-p").arg(&directory).arg("-e").arg("stderr").arg("-c").arg(directory.join("nginx.conf"));
        lab.start(&format!("nginx-{place}.log"), command)?;
        Ok(Self { log })
    }

    /// The last request that it logged, and how many there were.
    pub(crate) fn requests(&self) -> Result<Vec<Value>> {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        log.lines().map(|line| serde_json::from_str(line).with_context(|| format!("nginx logged {line}"))).collect()
    }
}

/// What curl said.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The command, as somebody would type it.
    pub(crate) command: String,
    /// curl's exit code.
    pub(crate) code: i32,
    /// The status of the answer, 0 without one.
    pub(crate) status: u16,
    pub(crate) body: String,
    /// curl's own address and port, as it saw them.
    pub(crate) local: Option<SocketAddr>,
    /// The address that curl believes to be connected to.
    pub(crate) remote: Option<SocketAddr>,
    /// What curl complained of.
    pub(crate) error: String,
}

/// The URL of the service for web.
pub(crate) fn service_url(path: &str) -> String {
    format!("http://{SERVICE_NAME}{path}")
}

/// The URL at an address.
pub(crate) fn url(address: Ipv4Addr, port: u16, path: &str) -> String {
    format!("http://{address}:{port}{path}")
}

/// curl in a pod, with the one name that it needs.
pub(crate) fn curl_command(place: &str, url: &str) -> Command {
    let mut command = netns::command(&namespace(place), "curl");
    command.args(["--silent", "--show-error", "--noproxy", "*", "--resolve", &format!("{SERVICE_NAME}:80:{SERVICE}"), url]);
    command
}

/// Runs curl in a pod, or anywhere.
pub(crate) fn curl(place: &str, url: &str) -> Result<Answer> {
    let mut command = curl_command(place, url);
    let facts = "\n%{http_code} %{local_ip} %{local_port} %{remote_ip} %{remote_port}";
    let output = command.args(["--max-time", "5", "--write-out", facts]).output().context("starting curl")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (body, facts) = text.rsplit_once('\n').unwrap_or((&text, ""));
    let facts: Vec<&str> = facts.split(' ').collect();
    let address = |at: usize| Some(SocketAddr::new(facts.get(at)?.parse().ok()?, facts.get(at + 1)?.parse().ok()?));
    Ok(Answer {
        command: format!("{place}$ curl {url}"),
        code: output.status.code().unwrap_or(-1),
        status: facts.first().and_then(|status| status.parse().ok()).unwrap_or_default(),
        body: body.to_owned(),
        local: address(1),
        remote: address(3),
        error: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}
