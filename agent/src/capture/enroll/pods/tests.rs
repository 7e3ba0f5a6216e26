use super::*;

const UID: &str = "37182395-691d-4cd4-9c3f-93f2b9c9d83f";
const OTHER: &str = "c2d7c9a6-2f0e-4a5e-8f5b-0a1f3f1f7c11";
/// Namespaces that are wanted have their inode, and this, for a cookie.
const COOKIES: u64 = 1 << 40;

/// A node of files.
struct Node(tempfile::TempDir);

impl Node {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
        fs::write(path, text).expect("a file");
    }

    fn logs(&self, namespace: &str, uid: &str) {
        fs::create_dir_all(self.path(&format!("logs/{namespace}_any-name_{uid}"))).expect("a directory");
    }

    /// A process in a cgroup, whose network namespace is a file of that name.
    fn process(&self, number: u32, cgroup: &str, netns: &str) {
        let procs = self.path(&format!("cgroup/{cgroup}/cgroup.procs"));
        let before = fs::read_to_string(procs).unwrap_or_default();
        self.write(&format!("cgroup/{cgroup}/cgroup.procs"), &format!("{before}{number}\n"));
        self.write(&format!("proc/{number}/cgroup"), &format!("1:name=systemd:/other\n0::/kubepods/{cgroup}\n"));
        if !self.path(netns).exists() {
            self.write(netns, "");
        }
        fs::create_dir_all(self.path(&format!("proc/{number}/ns"))).expect("a directory");
        fs::hard_link(self.path(netns), self.path(&format!("proc/{number}/ns/net"))).expect("a link");
    }

    fn look(&self, wanted: &[&str], known: &[&str]) -> Found {
        let [logs, cgroups, processes] = ["logs", "cgroup", "proc"].map(|name| self.path(name));
        let excluded_namespaces = ["kube-system".to_owned()].into();
        let cookies = wanted.iter().map(|netns| self.inode(netns)).map(|inode| (inode, inode + COOKIES)).collect();
        let known = known.iter().map(|uid| (*uid).into()).collect();
        NodePods { excluded_namespaces, logs, cgroups, processes }.look(&Wanted { cookies, known })
    }

    /// Asserts which pods are found, all of these network namespaces being wanted.
    #[track_caller]
    fn check(&self, wanted: &[&str], expected: &[(&str, &str)]) {
        let expected = expected.iter().map(|(netns, uid)| (self.inode(netns) + COOKIES, (*uid).into())).collect();
        assert_eq!(self.look(wanted, &[]).pods, expected);
    }

    fn inode(&self, netns: &str) -> u64 {
        fs::metadata(self.path(netns)).expect("a file").ino()
    }
}

#[test]
fn a_pod_is_found_in_cgroups_of_every_driver_class_and_runtime_by_the_namespace_of_its_processes() {
    let slice = UID.replace('-', "_");
    let pods = [
        format!("burstable/pod{UID}"),
        format!("pod{UID}"),
        format!("kubepods-besteffort.slice/kubepods-besteffort-pod{slice}.slice"),
        format!("kubepods-pod{slice}.slice"),
        format!("kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{slice}.slice"),
    ];
    // containerd's and CRI-O's containers, in a cgroup of the kubelet's or of systemd's; the last as crun has it.
    for container in ["5f0e", "crio-5f0e", "cri-containerd-5f0e.scope", "crio-5f0e.scope", "crio-5f0e.scope/container"] {
        for pod in &pods {
            let node = Node::new();
            node.process(7, &format!("{pod}/{container}"), "netns");
            node.process(8, &format!("burstable/pod{OTHER}/container"), "other");
            node.check(&["netns", "other"], &[("netns", UID), ("other", OTHER)]);
            node.check(&["other"], &[("other", OTHER)]);
        }
    }
}

#[test]
fn what_watches_over_a_pods_containers_does_not_count_and_what_a_pod_names_like_it_does() {
    for container in ["crio-5f0e.scope", "crio-5f0e"] {
        let node = Node::new();
        node.process(7, &format!("pod{UID}/{container}"), "netns");
        node.process(8, &format!("pod{UID}/crio-conmon-{}", &container[5..]), "node");
        node.check(&["netns", "node"], &[("netns", UID)]);
        node.process(9, &format!("pod{UID}/{container}/crio-conmon-x"), "visited");
        node.check(&["netns", "node", "visited"], &[]);
    }
    // Of a pod on the node's network nothing is wanted but that it is taken for no other.
    let node = Node::new();
    node.process(7, &format!("pod{UID}/crio-5f0e.scope"), "node");
    node.process(8, &format!("pod{UID}/crio-5f0f.scope"), "visited");
    node.process(9, &format!("pod{UID}/crio-conmon-5f0e.scope"), "node");
    node.check(&["visited"], &[]);
}

#[test]
fn a_cgroup_above_the_kubelets_is_no_pods_whatever_its_name() {
    let node = Node::new();
    node.process(7, &format!("pod{UID}/sandbox"), "netns");
    node.write("proc/7/cgroup", &format!("0::/podman-1.scope/kubelet/kubepods/pod{UID}/sandbox\n"));
    node.check(&["netns"], &[("netns", UID)]);
}

#[test]
fn a_pod_whose_namespace_is_known_is_not_looked_for() {
    let node = Node::new();
    node.process(7, &format!("pod{UID}/sandbox"), "netns");
    assert_eq!(node.look(&["netns"], &[UID]).pods, BTreeMap::new());
}

#[test]
fn a_pod_that_is_in_several_network_namespaces_tells_of_none() {
    let node = Node::new();
    node.process(7, &format!("pod{UID}/sandbox"), "own");
    node.check(&["own"], &[("own", UID)]);
    node.process(8, &format!("pod{UID}/plug-in"), "visited");
    node.check(&["own", "visited"], &[]);
}

#[test]
fn a_namespace_with_processes_of_several_pods_is_none_of_theirs() {
    let node = Node::new();
    node.process(7, &format!("pod{UID}/sandbox"), "netns");
    node.process(8, &format!("besteffort/pod{OTHER}/intruder"), "netns");
    node.check(&["netns"], &[]);
}

#[test]
fn a_number_that_is_another_pods_by_now_tells_nothing() {
    let node = Node::new();
    node.process(7, &format!("pod{UID}/sandbox"), "netns");
    node.write("proc/7/cgroup", &format!("0::/kubepods/pod{OTHER}/container\n"));
    node.check(&["netns"], &[]);
}

#[test]
fn a_pod_does_not_pass_for_another_by_the_names_of_cgroups_below_its_own() {
    let node = Node::new();
    node.process(7, &format!("pod{UID}/pod{OTHER}"), "netns");
    node.check(&["netns"], &[("netns", UID)]);
    let node = Node::new();
    node.process(7, &format!("burstable/pod{UID}/pod{OTHER}"), "netns");
    // What a look at the other's cgroup might come upon, too.
    node.write(&format!("cgroup/pod{OTHER}/cgroup.procs"), "7\n");
    node.check(&["netns"], &[("netns", UID)]);
}

#[test]
fn pods_of_excluded_namespaces_are_told_by_their_directories_of_logs_and_others_are_not() {
    let node = Node::new();
    node.logs("shop", UID);
    node.logs("kube-system", OTHER);
    let told: BTreeSet<PodUid> = [OTHER.into()].into();
    assert_eq!(node.look(&[], &[]).excluded, told);
}
