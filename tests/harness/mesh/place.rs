//! Pods: their objects, their namespaces, and what they are known by.

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;

use super::{Mesh, NODES};
use crate::eventually;
use crate::netns::Namespace;

/// Addresses that no pod has a way to.
const NOWHERE: (Ipv4Addr, Ipv6Addr) = (Ipv4Addr::new(192, 0, 2, 1), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));

/// A pod to be made.
#[derive(Clone, Copy, Debug)]
pub struct PodSpec<'a> {
    /// Its name, service account and label `app`.
    pub name: &'a str,
    /// Its namespace.
    pub namespace: &'a str,
    /// The number of its node.
    pub node: usize,
    /// Whether it is in the mesh.
    pub enrolled: bool,
}

/// The address families that a pod has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Families {
    /// Both.
    Both,
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
}

/// A pod that is there.
#[derive(Debug)]
pub struct Pod {
    /// Its network namespace.
    pub netns: Namespace,
    /// Its IPv4 address. One of IPv6 only would have it, but has not.
    pub v4: IpAddr,
    /// Its IPv6 address. One of IPv4 only would have it, but has not.
    pub v6: IpAddr,
    mount: PathBuf,
}

impl Pod {
    /// Its address and `port`, in either family.
    #[must_use]
    pub fn at(&self, v6: bool, port: u16) -> SocketAddr {
        SocketAddr::new(if v6 { self.v6 } else { self.v4 }, port)
    }

    /// Cuts the pod off, as if its node had lost power: what is sent to it is answered by nobody.
    pub fn unplug(&self) {
        self.netns.ip("link set eth0 down");
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // The kernel takes its time with what is left in a namespace; the network's end is its plugin's work.
        let _gone_already = Command::new("ip").args(["-n", self.netns.name(), "link", "del", "eth0"]).output();
        let _gone_already = Command::new("umount").arg(&self.mount).output();
        let _gone_already = fs::remove_file(&self.mount);
    }
}

/// The addresses of a pod by its number.
#[must_use]
pub fn addresses(number: u16) -> (Ipv4Addr, Ipv6Addr) {
    let [high, low] = number.to_be_bytes();
    (Ipv4Addr::new(10, 77, 1 + high, low), Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 1, number))
}

/// The link's address that goes with them: neighbours of a pod that is gone find its successor.
#[must_use]
pub fn link_address(number: u16) -> String {
    let [high, low] = number.to_be_bytes();
    format!("02:77:00:00:{high:02x}:{low:02x}")
}

/// The manifest of a pod at the addresses of this number.
#[must_use]
pub fn manifest(spec: PodSpec<'_>, number: u16) -> String {
    manifest_of(spec, number, Families::Both)
}

/// The same, of a pod that may have one family only.
#[must_use]
pub fn manifest_of(spec: PodSpec<'_>, number: u16, families: Families) -> String {
    let PodSpec { name, namespace, node, enrolled } = spec;
    let ((v4, v6), label) = (addresses(number), if enrolled { "enabled" } else { "disabled" });
    let (first, all) = match families {
        Families::Both => (v4.to_string(), format!("{{ip: {v4}}}, {{ip: \"{v6}\"}}")),
        Families::V4 => (v4.to_string(), format!("{{ip: {v4}}}")),
        Families::V6 => (format!("\"{v6}\""), format!("{{ip: \"{v6}\"}}")),
    };
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, \
         labels: {{app: {name}, culvert.dev/mesh: {label}}}}}\n\
         spec: {{nodeName: {}, serviceAccountName: {name}, containers: [{{name: app, image: none}}]}}\n\
         status: {{phase: Running, podIP: {first}, podIPs: [{all}], \
         conditions: [{{type: Ready, status: \"True\"}}]}}\n",
        NODES[node]
    )
}

impl Mesh {
    /// Makes a pod; in the mesh it is enrolled when this returns.
    ///
    /// # Panics
    /// When it cannot be made, or is not enrolled in time.
    pub fn pod(&mut self, spec: PodSpec<'_>) -> Pod {
        let pod = self.place(spec);
        let outside = SocketAddr::from(([10, 77, 0, 1], 15012));
        self.await_pod(spec, || crate::app::connect(&pod.netns, outside).is_ok());
        pod
    }

    /// The same, of a pod that may have one family only.
    ///
    /// # Panics
    /// When it cannot be made, or is not enrolled in time.
    pub fn pod_of(&mut self, spec: PodSpec<'_>, families: Families) -> Pod {
        self.pods += 1;
        self.apply(&format!("pod-{}", spec.name), &manifest_of(spec, self.pods, families));
        let pod = self.place_unplugged(spec, self.pods);
        self.plug_into(&pod, spec.node, self.pods, families);
        // There is no way there, which the network says only of a connection that nobody has refused before.
        let outside = SocketAddr::new(if families == Families::V6 { NOWHERE.1.into() } else { NOWHERE.0.into() }, 9);
        let lost = |error: std::io::Error| error.kind() == std::io::ErrorKind::NetworkUnreachable;
        self.await_pod(spec, || crate::app::connect(&pod.netns, outside).is_err_and(lost));
        pod
    }

    /// Waits until a pod may connect, and is enrolled if it is in the mesh.
    fn await_pod(&self, PodSpec { name, node, enrolled, .. }: PodSpec<'_>, may_connect: impl Fn() -> bool) {
        // Agents that are attached to all see all of this kernel's pods: each has to learn that the namespace is a pod, or none of its own.
        eventually(&format!("{name} may connect"), may_connect);
        if enrolled {
            let log = format!("agent-{}", NODES[node]);
            let lines = [format!("pod enrolled pod={name} "), format!("\"message\":\"pod enrolled\",\"pod\":\"{name}\"")];
            eventually(&format!("{name} is enrolled"), || lines.iter().any(|line| self.log(&log).contains(line)));
        }
    }

    /// Makes a pod, and waits for nothing.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn place(&mut self, spec: PodSpec<'_>) -> Pod {
        self.pods += 1;
        self.place_at(spec, self.pods)
    }

    /// Makes a pod at the addresses of this number, which may have been another's before; the pods of [`place`](Self::place) count
    /// from 1. Waits for nothing.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn place_at(&self, spec: PodSpec<'_>, number: u16) -> Pod {
        self.apply(&format!("pod-{}", spec.name), &manifest(spec, number));
        self.place_only(spec, number)
    }

    /// Makes a pod's namespace, but not its object.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn place_only(&self, spec: PodSpec<'_>, number: u16) -> Pod {
        let pod = self.place_unplugged(spec, number);
        self.plug(&pod, spec.node, number);
        pod
    }

    /// Makes a pod's namespace, without a network yet, and puts it into its node's directory, as a runtime does first.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn place_unplugged(&self, PodSpec { name, node, enrolled, .. }: PodSpec<'_>, number: u16) -> Pod {
        let (v4, v6) = addresses(number);
        let cgroup = self.cgroup(node).filter(|_| enrolled);
        let netns = Namespace::in_cgroup(&format!("{}-p{number}", self.id), cgroup);
        let mount = self.netns_dir(node).join(name);
        File::create(&mount).expect("a file to mount on");
        let mounted = Command::new("mount").arg("--bind").arg(netns.path()).arg(&mount).status().expect("mount is there");
        assert!(mounted.success());
        Pod { netns, v4: v4.into(), v6: v6.into(), mount }
    }

    /// Gives a pod its network: a veth to its node's bridge, and the addresses of this number.
    pub fn plug(&self, pod: &Pod, node: usize, number: u16) {
        self.plug_into(pod, node, number, Families::Both);
    }

    fn plug_into(&self, Pod { netns, v4, v6, .. }: &Pod, node: usize, number: u16, families: Families) {
        let (address, far) = (link_address(number), self.nodes[node].name());
        netns.ip(&format!("link add eth0 address {address} type veth peer name v{number} netns {far}"));
        self.nodes[node].ip(&format!("link set v{number} master br0"));
        self.nodes[node].ip(&format!("link set v{number} up"));
        netns.ip("link set eth0 up");
        if families != Families::V6 {
            netns.ip(&format!("addr add {v4}/16 dev eth0"));
        }
        if families != Families::V4 {
            netns.ip(&format!("addr add {v6}/64 dev eth0 nodad"));
        }
    }

    /// Takes a pod's namespace out of its node's directory, as a runtime does at the pod's end.
    ///
    /// # Panics
    /// When it is gone already.
    pub fn unmount(&self, pod: &Pod) {
        assert!(Command::new("umount").arg(&pod.mount).status().expect("umount is there").success());
        fs::remove_file(&pod.mount).expect("the file that it was mounted on");
    }
}
