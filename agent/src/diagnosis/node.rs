//! The node that this runs on, with or without Kubernetes.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Finding;
use crate::capture::probe;
use crate::config::{ADMIN_LISTEN, METRICS_LISTEN, READY_LISTEN};

/// Where an agent would find things.
#[derive(Clone, Debug)]
pub struct Places {
    /// The container runtime's directory of network namespaces.
    pub netns_dir: PathBuf,
    /// The root of the cgroup v2 tree; none: found from the mounts.
    pub cgroup_root: Option<PathBuf>,
    /// Where programs are to be pinned.
    pub bpf_dir: PathBuf,
}

/// How long a server on this machine may take to answer.
const PATIENCE: Duration = Duration::from_secs(1);
/// What is read of its page, in bytes: what identifies it comes first.
const PAGE: u64 = 64 * 1024;

/// The first version of Linux that has everything.
pub(super) const KERNEL_FLOOR: (u32, u32) = (5, 15);

/// Capabilities by their number in `linux/capability.h`, and what the agent needs each for.
const CAPABILITIES: [(u32, &str, &str); 3] = [
    (21, "CAP_SYS_ADMIN", "entering pods' network namespaces and loading programs"),
    (12, "CAP_NET_ADMIN", "routing in pods, socket marks and foreign source addresses"),
    (19, "CAP_SYS_PTRACE", "finding the namespaces of other processes"),
];

/// Looks at everything.
#[must_use]
pub fn check(places: &Places) -> Vec<Finding> {
    let mut findings = vec![kernel(&probe::release())];
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let missing = missing_capabilities(&status);
    findings.push(match missing.as_slice() {
        [] => Finding::ok("capabilities", "all that an agent needs"),
        missing => {
            Finding::error("capabilities", missing.join("; "), "run this as root, or give the container these capabilities")
        }
    });
    findings.extend(features(probe::features()));
    findings.push(match probe::cgroup_root(places.cgroup_root.as_deref()) {
        Ok(path) => Finding::ok("cgroup", format!("cgroup v2 is at {}", path.display())),
        Err(error) => {
            Finding::error("cgroup", error.to_string(), "mount cgroup v2, or boot with systemd.unified_cgroup_hierarchy=1")
        }
    });
    findings.push(match probe::bpffs(&places.bpf_dir) {
        Some(path) => Finding::ok("bpffs", format!("programs are, or can be, pinned below {}", path.display())),
        None => Finding::warning(
            "bpffs",
            format!("no bpffs is mounted at {}", places.bpf_dir.display()),
            "mount -t bpf bpf /sys/fs/bpf, or let agents do it: agent.mountBpffs=true",
        ),
    });
    findings.push(namespaces(&places.netns_dir));
    findings.push(super::clock::of_this_machine());
    let agent_runs = agent_runs(METRICS_LISTEN.port());
    findings.extend([ADMIN_LISTEN, METRICS_LISTEN, READY_LISTEN].into_iter().map(|address| port(address, agent_runs)));
    findings
}

/// The version in a kernel's release, such as `6.1.0-18-amd64`.
pub(super) fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|letter: char| !letter.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn kernel(release: &str) -> Finding {
    let (major, minor) = KERNEL_FLOOR;
    match version(release) {
        Some(version) if version >= KERNEL_FLOOR => Finding::ok("kernel", format!("Linux {release}")),
        Some(_) => {
            Finding::error("kernel", format!("Linux {release} is older than {major}.{minor}"), "use a newer kernel on this node")
        }
        None => Finding::warning(
            "kernel",
            format!("`{release}` is not understood"),
            format!("see that it is {major}.{minor} or newer"),
        ),
    }
}

/// What of [`CAPABILITIES`] the effective set of a process's `/proc/<pid>/status` lacks.
fn missing_capabilities(status: &str) -> Vec<String> {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok()).unwrap_or(0);
    let missing = CAPABILITIES.iter().filter(|(number, ..)| effective & (1 << number) == 0);
    missing.map(|(_, name, what)| format!("{name} is missing, for {what}")).collect()
}

fn features(features: Vec<probe::Feature>) -> Vec<Finding> {
    let count = features.len();
    let mut findings: Vec<Finding> = features.into_iter().filter_map(feature).collect();
    if findings.is_empty() {
        findings.push(Finding::ok("features", format!("the kernel has all {count} features that the programs need")));
    }
    findings
}

fn feature(feature: probe::Feature) -> Option<Finding> {
    let probe::Feature { name, since, present } = feature;
    match present {
        Ok(true) => None,
        Ok(false) => Some(Finding::error(
            "features",
            format!("the kernel has no {name}"),
            format!("use a kernel that is built with it (Linux {since} and newer can have it)"),
        )),
        Err(error) => {
            Some(Finding::warning("features", format!("whether the kernel has {name} is not known: {error}"), "run this as root"))
        }
    }
}

fn namespaces(directory: &Path) -> Finding {
    match fs::read_dir(directory) {
        Ok(entries) => Finding::ok("namespaces", format!("{} has {} network namespaces", directory.display(), entries.count())),
        Err(error) => Finding::warning(
            "namespaces",
            format!("{}: {error}", directory.display()),
            "name the container runtime's directory with --netns-dir (containerd and CRI-O use /run/netns)",
        ),
    }
}

/// Whether an agent can listen at an address, or does.
fn port(address: SocketAddr, agent_runs: bool) -> Finding {
    match TcpListener::bind(address) {
        Ok(_) => Finding::ok("ports", format!("{address} is free")),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && agent_runs => {
            Finding::ok("ports", format!("an agent listens on {address}"))
        }
        Err(error) => Finding::error(
            "ports",
            format!("{address}: {error}"),
            "end what listens there, or move the agent (see `culvert agent --help`)",
        ),
    }
}

/// Whether an agent serves its metrics here.
fn agent_runs(port: u16) -> bool {
    let page = || -> io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&(Ipv4Addr::LOCALHOST, port).into(), PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut page = String::new();
        stream.take(PAGE).read_to_string(&mut page)?;
        Ok(page)
    };
    page().is_ok_and(|page| page.contains("culvert_build_info"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnosis::Severity;

    #[test]
    fn kernels_below_the_floor_are_errors() {
        for (release, severity) in [
            ("5.15.0", Severity::Ok),
            ("6.18.44-fc-v657", Severity::Ok),
            ("5.14.99-generic", Severity::Error),
            ("4.18.0-513.el8.x86_64", Severity::Error),
            ("", Severity::Warning),
            ("next", Severity::Warning),
        ] {
            assert_eq!(kernel(release).severity, severity, "{release}");
        }
    }

    #[test]
    fn missing_capabilities_are_named_with_what_they_are_for() {
        assert!(missing_capabilities("Name:\tx\nCapEff:\t000001ffffffffff\n").is_empty());
        let missing = missing_capabilities("CapEff:\t0000000000201000\n");
        assert_eq!(missing, ["CAP_SYS_PTRACE is missing, for finding the namespaces of other processes"]);
        assert_eq!(missing_capabilities("").len(), 3);
    }

    #[test]
    fn an_absent_feature_is_an_error_and_an_unknown_one_a_warning() {
        let with = |present| features(vec![probe::Feature { name: "x", since: "5.9", present }]);
        assert_eq!(with(Ok(true))[0].severity, Severity::Ok);
        assert_eq!(with(Ok(false))[0].severity, Severity::Error);
        assert!(with(Ok(false))[0].remedy.as_deref().is_some_and(|remedy| remedy.contains("5.9")));
        assert_eq!(with(Err("denied".to_owned()))[0].severity, Severity::Warning);
    }

    #[test]
    fn a_port_that_somebody_else_has_is_an_error_and_the_agents_own_is_none() {
        let other = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let address = other.local_addr().expect("an address");
        assert_eq!(port(address, false).severity, Severity::Error);
        assert_eq!(port(address, true).severity, Severity::Ok);
    }
}
