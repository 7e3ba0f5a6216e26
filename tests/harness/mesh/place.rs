//! Pods: their objects, their namespaces, and what they are known by.

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;

use super::{Mesh, NODES};
use crate::eventually;
use crate::netns::Namespace;

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

/// A pod that is there.
#[derive(Debug)]
pub struct Pod {
    /// Its network namespace.
    pub netns: Namespace,
    /// Its IPv4 address.
    pub v4: IpAddr,
    /// Its IPv6 address.
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
    let PodSpec { name, namespace, node, enrolled } = spec;
    let ((v4, v6), label) = (addresses(number), if enrolled { "enabled" } else { "disabled" });
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, \
         labels: {{app: {name}, culvert.dev/mesh: {label}}}}}\n\
         spec: {{nodeName: {}, serviceAccountName: {name}, containers: [{{name: app, image: none}}]}}\n\
         status: {{phase: Running, podIP: {v4}, podIPs: [{{ip: {v4}}}, {{ip: \"{v6}\"}}], \
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
        let PodSpec { name, node, enrolled, .. } = spec;
        let pod = self.place(spec);
        // Both agents see all processes of this kernel: each has to learn that the namespace is a pod, or none of its own.
        let outside = SocketAddr::from(([10, 77, 0, 1], 15012));
        eventually(&format!("{name} may connect"), || crate::app::connect(&pod.netns, outside).is_ok());
        if enrolled {
            let log = format!("agent-{}", NODES[node]);
            let lines = [format!("pod enrolled pod={name} "), format!("\"message\":\"pod enrolled\",\"pod\":\"{name}\"")];
            eventually(&format!("{name} is enrolled"), || lines.iter().any(|line| self.log(&log).contains(line)));
        }
        pod
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
    pub fn place_unplugged(&self, PodSpec { name, node, .. }: PodSpec<'_>, number: u16) -> Pod {
        let (v4, v6) = addresses(number);
        let netns = Namespace::new(&format!("{}-p{number}", self.id));
        let mount = self.netns_dir(node).join(name);
        File::create(&mount).expect("a file to mount on");
        let mounted = Command::new("mount").arg("--bind").arg(netns.path()).arg(&mount).status().expect("mount is there");
        assert!(mounted.success());
        Pod { netns, v4: v4.into(), v6: v6.into(), mount }
    }

    /// Gives a pod its network: a veth to its node's bridge, and the addresses of this number.
    pub fn plug(&self, Pod { netns, v4, v6, .. }: &Pod, node: usize, number: u16) {
        let (address, far) = (link_address(number), self.nodes[node].name());
        netns.ip(&format!("link add eth0 address {address} type veth peer name v{number} netns {far}"));
        self.nodes[node].ip(&format!("link set v{number} master br0"));
        self.nodes[node].ip(&format!("link set v{number} up"));
        netns.ip("link set eth0 up");
        netns.ip(&format!("addr add {v4}/16 dev eth0"));
        netns.ip(&format!("addr add {v6}/64 dev eth0 nodad"));
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
