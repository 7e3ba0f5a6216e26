//! Promise: what an operator gets wrong is answered with the flag, file or object, the value, and the way out; what ran before runs on.

use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use harness::{Mesh, PodSpec, app, cgroup, eventually};

/// A directory of this test's, removed with it.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = PathBuf::from(format!("/run/culvert-test/mistakes-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).expect("a directory");
        Self(path)
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        fs::write(self.0.join(name), content).expect("a file");
        self.path(name)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A mount of bpffs may be in it.
        for name in ["bpf", "bpf/n"] {
            let _not_mounted = Command::new("umount").arg(self.0.join(name)).output();
        }
        let _left = fs::remove_dir_all(&self.0);
    }
}

fn culvert() -> Command {
    Command::new(std::env::var("CULVERT_BIN").expect("CULVERT_BIN names the binary under test: run `cargo xtask test hostile`"))
}

/// Runs to its end, which must come at once and be a failure, and checks that all of `parts` are in what it says.
#[track_caller]
fn fails(mut command: Command, parts: &[&str]) {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary is there");
    let (status, said) = end(child);
    let line = format!("{:?}", command.get_args().collect::<Vec<_>>().join(std::ffi::OsStr::new(" ")));
    assert_eq!(status.map(|code| code == 0), Some(false), "{line} has not failed: {said}");
    assert!(!said.contains("panicked") && !said.contains("RUST_BACKTRACE"), "{line}: {said}");
    for part in parts {
        assert!(said.contains(part), "`{part}` is not in what {line} says:\n{said}");
    }
}

/// Waits ten seconds at most; no status for a process that had to be killed.
fn end(mut child: Child) -> (Option<i32>, String) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut status = None;
    while Instant::now() < deadline && status.is_none() {
        status = child.try_wait().expect("a child");
        std::thread::sleep(Duration::from_millis(5));
    }
    if status.is_none() {
        child.kill().expect("a child");
    }
    let output = child.wait_with_output().expect("its output");
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    (status.and_then(|status| status.code()), said)
}

fn controller(scratch: &Scratch, more: &[&str]) -> Command {
    let mut command = culvert();
    command.args(["controller", "--manifests"]).arg(scratch.0.join("manifests"));
    if !more.contains(&"--state-dir") {
        command.arg("--state-dir").arg(scratch.0.join("state"));
    }
    if !more.contains(&"--listen") {
        command.args(["--listen", "127.0.0.1:0"]);
    }
    command.args(more);
    command
}

fn agent(scratch: &Scratch, more: &[&str]) -> Command {
    let mut command = culvert();
    command.arg("agent");
    for (flag, value) in [
        ("--node", "n"),
        ("--controller", "https://127.0.0.1:1"),
        ("--root-cert", &scratch.path("root.pem")),
        ("--token-file", &scratch.path("token")),
        ("--netns-dir", &scratch.path("netns")),
        ("--bpf-dir", &scratch.path("bpf")),
        ("--state-dir", &scratch.path("state")),
        ("--cgroup-root", &cgroup::own().display().to_string()),
        ("--metrics-listen", "127.0.0.1:0"),
        ("--ready-listen", "127.0.0.1:0"),
        ("--admin-listen", "127.0.0.1:0"),
    ] {
        if !more.contains(&flag) {
            command.args([flag, value]);
        }
    }
    command.args(more);
    command
}

#[test]
fn wrong_flags_of_the_agent() {
    let scratch = Scratch::new("agent");
    fs::create_dir(scratch.0.join("netns")).expect("a directory");
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = taken.local_addr().expect("an address").to_string();
    let plain = scratch.file("plain", "");
    let check = |more: &[&str], parts: &[&str]| fails(agent(&scratch, more), parts);
    check(&["--controller", "http://10.0.0.1:15012"], &["http://10.0.0.1:15012", "https"]);
    check(&["--controller", "10.0.0.1"], &["10.0.0.1", "https://HOST:PORT"]);
    check(&["--node", "a b"], &["--node", "`a b`", "kubectl get nodes"]);
    check(&["--node", ""], &["--node"]);
    check(&["--metrics-listen", "somewhere"], &["--metrics-listen", "somewhere", "IP:PORT"]);
    check(&["--metrics-listen", &taken], &["metrics", &taken, "--metrics-listen", "in use"]);
    check(&["--ready-listen", &taken], &["readiness", &taken, "--ready-listen", "in use"]);
    check(&["--admin-listen", &taken], &["admin", &taken, "--admin-listen", "in use"]);
    check(&["--metrics-listen", "192.0.2.77:15020"], &["192.0.2.77:15020", "--metrics-listen", "assign"]);
    check(&["--root-cert", "/"], &["--root-cert", "`/` is a directory"]);
    check(&["--token-file", "/"], &["--token-file", "`/` is a directory"]);
    check(&["--cgroup-root", "/proc"], &["/proc", "is not on cgroup v2", "--cgroup-root"]);
    check(&["--cgroup-root", "/no/such/place"], &["/no/such/place", "No such file", "--cgroup-root"]);
    check(&["--cgroup-root", &plain], &[&plain, "--cgroup-root"]);
    check(&["--bpf-dir", &format!("{plain}/below")], &[&plain, "bpffs", "--bpf-dir"]);
    check(&["--netns-dir", &plain], &[&plain, "Not a directory", "--netns-dir"]);
    check(&["--netns-dir", &format!("{plain}/below")], &[&plain, "Not a directory", "--netns-dir"]);
    let mistyped = scratch.path("netsn/cni");
    check(&["--netns-dir", &mistyped], &[&mistyped, "No such file", "create the directory", "--netns-dir"]);
    assert!(!scratch.0.join("netsn").exists(), "a mistyped directory was made");
    check(&["--log-format", "xml"], &["xml", "text, json"]);
    check(&["--drain-timeout", "soon"], &["soon", "10s"]);
    check(&["--wat"], &["--wat", "--help"]);
}

#[test]
fn an_agent_that_is_not_root_says_what_it_lacks() {
    let scratch = Scratch::new("nobody");
    fs::create_dir(scratch.0.join("netns")).expect("a directory");
    // The binary and the directory must be within the reach of nobody.
    let binary = scratch.0.join("culvert");
    fs::copy(std::env::var("CULVERT_BIN").expect("CULVERT_BIN"), &binary).expect("a copy");
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all"]).arg(binary);
    let as_root = agent(&scratch, &[]);
    command.args(as_root.get_args());
    fails(command, &["CAP_NET_ADMIN and CAP_SYS_ADMIN", "root"]);
}

#[test]
fn wrong_flags_of_the_controller() {
    let scratch = Scratch::new("controller");
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = taken.local_addr().expect("an address").to_string();
    let plain = scratch.file("plain", "");
    let check = |more: &[&str], parts: &[&str]| fails(controller(&scratch, more), parts);
    check(&["--listen", &taken], &[&taken, "another controller", "in use"]);
    check(&["--listen", "15012"], &["15012", "IP:PORT"]);
    check(&["--trust-domain", "Not A Domain"], &["--trust-domain", "Not A Domain"]);
    check(&["--cert-ttl", "0s"], &["--cert-ttl", "0s"]);
    check(&["--cert-ttl", "a while"], &["--cert-ttl", "a while"]);
    check(&["--state-dir", &plain], &[&plain, "not a directory"]);
    check(&["--state-dir", ""], &["--state-dir"]);
    check(&["--root-namespace", ""], &["--root-namespace"]);
}

/// What is wrong, the key's file, the certificate's, and what is said.
type DamagedAuthority<'a> = (&'a str, Option<&'a [u8]>, Option<&'a [u8]>, &'a [&'a str]);

#[test]
fn a_damaged_authority_is_named_and_left_alone() {
    let good = Scratch::new("authority");
    let mut running = controller(&good, &[]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the binary is there");
    let read = |scratch: &Scratch, name: &str| fs::read(scratch.0.join("state").join(name));
    eventually("there is an authority", || read(&good, "root-cert.pem").is_ok_and(|certificate| !certificate.is_empty()));
    running.kill().expect("a child");
    running.wait().expect("a child");
    let (key, certificate) = (read(&good, "ca-key.pem").expect("a key"), read(&good, "root-cert.pem").expect("a certificate"));
    let foreign = rcgen::KeyPair::generate().expect("a key");
    let leaf = rcgen::CertificateParams::default().self_signed(&foreign).expect("a certificate").pem();
    let foreign = foreign.serialize_pem();
    let half = &key[..key.len() / 2];
    let cases: [DamagedAuthority<'_>; 11] = [
        ("no key", None, Some(&certificate), &["ca-key.pem is missing"]),
        ("no certificate", Some(&key), None, &["root-cert.pem is missing"]),
        ("an empty key", Some(b""), Some(&certificate), &["ca-key.pem holds no usable private key"]),
        ("half a key", Some(half), Some(&certificate), &["ca-key.pem holds no usable private key"]),
        ("a binary key", Some(&[0xff, 0xfe, 0]), Some(&certificate), &["ca-key.pem is not text"]),
        ("a certificate for a key", Some(&certificate), Some(&certificate), &["ca-key.pem holds no usable private key"]),
        ("an empty certificate", Some(&key), Some(b""), &["root-cert.pem holds no PEM certificate"]),
        ("a key for a certificate", Some(&key), Some(&key), &["root-cert.pem holds no PEM certificate"]),
        (
            "a damaged certificate",
            Some(&key),
            Some(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
            &["root-cert.pem"],
        ),
        (
            "the key of another",
            Some(foreign.as_bytes()),
            Some(&certificate),
            &["root-cert.pem is not the certificate of the key"],
        ),
        ("a leaf", Some(foreign.as_bytes()), Some(leaf.as_bytes()), &["not the certificate of an authority"]),
    ];
    for (number, (what, key, certificate, parts)) in cases.into_iter().enumerate() {
        let scratch = Scratch::new(&format!("authority-{number}"));
        let state = scratch.0.join("state");
        fs::create_dir(&state).expect("a directory");
        let files = [("ca-key.pem", key), ("root-cert.pem", certificate)];
        for (name, content) in files.iter().filter_map(|(name, content)| Some((name, (*content)?))) {
            fs::write(state.join(name), content).expect("a file");
        }
        fails(controller(&scratch, &[]), &[parts, &["restore it from a backup", "root-cert.pem"]].concat());
        for (name, content) in files {
            assert_eq!(fs::read(state.join(name)).ok().as_deref(), content, "{what}: {name} was changed");
        }
    }
}

/// An agent that waits for something to be put right, and what it says meanwhile.
struct WaitingAgent {
    child: Child,
    log: PathBuf,
}

impl WaitingAgent {
    fn start(mesh: &Mesh, scratch: &Scratch, root: &str, token: &str) -> Self {
        let log = scratch.0.join("log");
        let mut command = mesh.node(0).command(&std::env::var("CULVERT_BIN").expect("CULVERT_BIN"));
        let own = agent(scratch, &["--controller", "https://10.77.0.1:15012", "--root-cert", root, "--token-file", token]);
        let file = fs::File::create(&log).expect("a log");
        let child = command.args(own.get_args()).stdout(file.try_clone().expect("a log")).stderr(file).spawn();
        Self { child: child.expect("the binary is there"), log }
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for WaitingAgent {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _status = self.child.wait();
    }
}

#[test]
fn certificates_and_tokens_that_are_none() {
    let mesh = Mesh::start();
    let state = mesh.state_dir();
    let (good_root, good_token) = (state.join("root-cert.pem"), state.join("tokens/a"));
    let (good_root, good_token) = (good_root.to_str().expect("UTF-8"), good_token.to_str().expect("UTF-8"));
    let files = Scratch::new("files");
    let foreign = rcgen::KeyPair::generate().expect("a key");
    let authority = |until: i32| {
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.not_after = rcgen::date_time_ymd(until, 1, 1);
        params.not_before = rcgen::date_time_ymd(2000, 1, 1);
        params.self_signed(&foreign).expect("a certificate").pem()
    };
    let root = |name: &str, content: &[u8]| (files.file(name, content), good_token.to_owned());
    let token = |name: &str, content: &[u8]| (good_root.to_owned(), files.file(name, content));
    let cases: [((String, String), &[&str]); 11] = [
        ((files.path("no-root"), good_token.to_owned()), &["root certificate file", "no-root", "No such file"]),
        (root("empty-root", b""), &["root certificate file", "empty-root", "there is no certificate in it"]),
        (root("garbage-root", &[0xff; 999]), &["root certificate file", "garbage-root", "there is no certificate in it"]),
        (root("key-root", foreign.serialize_pem().as_bytes()), &["key-root", "there is no certificate in it"]),
        (root("expired-root", authority(2001).as_bytes()), &["expired-root", "does not verify", "root of this controller"]),
        (root("foreign-root", authority(2100).as_bytes()), &["foreign-root", "does not verify", "root of this controller"]),
        ((good_root.to_owned(), files.path("no-token")), &["token file", "no-token", "No such file"]),
        (token("empty-token", b"\n"), &["token file", "empty-token", "holds no token"]),
        (token("binary-token", &[0xff, 0, 1]), &["token file", "binary-token", "holds no token"]),
        (token("wrong-token", b"not-the-token"), &["refused the token", "not that of any node"]),
        (token("endless-token", &[b'x'; 2 << 20]), &["endless-token", "longer than"]),
    ];
    for (number, ((root, token), parts)) in cases.iter().enumerate() {
        let scratch = Scratch::new(&format!("waiting-{number}"));
        fs::create_dir(scratch.0.join("netns")).expect("a directory");
        let mut agent = WaitingAgent::start(&mesh, &scratch, root, token);
        let tells = |said: &str| said.lines().any(|line| parts.iter().all(|part| line.contains(part)));
        eventually(&format!("{root} and {token} are told of: {parts:?}"), || tells(&agent.said()));
        assert!(!agent.said().contains("panicked"), "{}", agent.said());
        assert_eq!(agent.child.try_wait().expect("a child"), None, "the agent waits for a better file");
    }
}

#[test]
fn manifests_that_make_no_sense_leave_the_last_good_state_in_force() {
    let mut mesh = Mesh::start();
    let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
    app::server(&server.netns, 8080, app::echo);
    let plain = mesh.pod(PodSpec { name: "plain", namespace: "shop", node: 0, enrolled: false });
    let takes_plaintext = || app::converse(&plain.netns, server.at(false, 8080), "hello").is_ok();
    mesh.mode("shop", "STRICT");
    eventually("STRICT holds", || !takes_plaintext());
    let before = mesh.process("controller").footprint();
    let good = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: shop}\n";
    let nested = format!("{good}spec: {}", "{mtls: ".repeat(5_000));
    let laughs: String = (1..10).fold("a0: &a0 [x, x, x, x, x, x, x, x]\n".to_owned(), |all, level| {
        let last = level - 1;
        all + &format!("a{level}: &a{level} [*a{last}, *a{last}, *a{last}, *a{last}, *a{last}, *a{last}, *a{last}]\n")
    });
    let quadratic = format!("a: &a \"{}\"\nb: [{}]\n", "x".repeat(1 << 20), "*a, ".repeat(20_000));
    let huge = format!("{good}# {}\n", "x".repeat(33 << 20));
    let cases: [(&str, &str, &[&str]); 12] = [
        ("YAML without an end", "apiVersion: [", &["document 1 is not YAML"]),
        ("half of a file", &good[..good.len() - 20], &["document 1 is not YAML"]),
        (
            "another type of field",
            &format!("{good}spec: {{mtls: [STRICT]}}\n"),
            &["PeerAuthentication shop/default", "spec.mtls"],
        ),
        ("an unknown mode", &format!("{good}spec: {{mtls: {{mode: strict}}}}\n"), &["spec.mtls.mode", "`strict`", "STRICT"]),
        ("an unknown field", &format!("{good}spec: {{mtl: {{}}}}\n"), &["mtl", "mtls"]),
        ("a text", "STRICT\n", &["document 1", "a text", "not a Kubernetes object"]),
        ("a binary", "\u{0}\u{1}\u{2}ELF", &["document 1 is not YAML"]),
        ("deep nesting", &nested, &["document 1 is not YAML", "recursion limit"]),
        ("laughter", &laughs, &["document 1 is not YAML", "repetition limit"]),
        ("a text repeated by reference", &quadratic, &["document 1"]),
        ("a file that is too large", &huge, &["cannot be read", "33554432", "split it"]),
        ("nothing that is a mode", &format!("{good}spec: {{mtls: {{mode: }}}}\n---\n{{"), &["document 2 is not YAML"]),
    ];
    for (what, text, parts) in cases {
        mesh.apply("mode-shop", text);
        let told = || {
            let log = mesh.log("controller");
            log.lines().any(|line| line.contains("mode-shop.yaml") && parts.iter().all(|part| line.contains(part)))
        };
        eventually(&format!("{what} is told of: {parts:?}"), told);
        assert!(!takes_plaintext(), "{what} has opened the server");
        let line = mesh.log("controller").lines().rfind(|line| line.contains("mode-shop.yaml")).map(str::to_owned);
        assert!(line.is_some_and(|line| line.contains("stays in force until it is put right") && line.len() < 2000), "{what}");
    }
    let after = mesh.process("controller").footprint();
    assert!(after.peak_kib < before.resident_kib + 512 * 1024, "{} KiB at its height", after.peak_kib);
    assert!(!mesh.log("controller").contains("panicked"));
    mesh.mode("shop", "PERMISSIVE");
    eventually("a good manifest takes effect again", takes_plaintext);
}

#[test]
fn objects_that_lack_another_or_clash_are_named() {
    let mut mesh = Mesh::start();
    let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
    app::server(&server.netns, 8080, app::echo);
    let friend = mesh.pod(PodSpec { name: "friend", namespace: "shop", node: 0, enrolled: true });
    let reached = || app::converse(&friend.netns, server.at(false, 8080), "hello").is_ok();
    eventually("the server is reached", reached);
    let pod = |name: &str, node: &str, ip: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{culvert.dev/mesh: enabled}}}}\n\
             spec: {{nodeName: {node}, serviceAccountName: nobody, containers: []}}\nstatus: {{phase: Running, podIP: {ip}}}\n"
        )
    };
    let slice = format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: lost, namespace: shop, \
         labels: {{kubernetes.io/service-name: lost}}}}\naddressType: IPv4\n\
         endpoints: [{{addresses: [{}], targetRef: {{kind: Pod, name: lost, namespace: shop}}}}]\n",
        server.v4
    );
    let cases: [(&str, String, &[&str]); 5] = [
        ("no-node", pod("strayed", "nowhere", "10.77.9.1"), &["shop/strayed", "nowhere", "Node"]),
        (
            "twin",
            pod("twin", "b", &server.v4.to_string()),
            &["shop/server", "shop/twin", "both have the address", "status.podIPs"],
        ),
        ("slice", slice.clone(), &["shop/lost", "Service"]),
        ("slice", slice.replace("10.77", "10.78"), &["shop/lost", "Pod"]),
        (
            "double",
            mesh.manifest("pod-server"),
            &["Pod shop/server is in", "double.yaml", "pod-server.yaml", "remove the others"],
        ),
    ];
    for (file, text, parts) in &cases {
        mesh.apply(file, text);
        eventually(&format!("{file} is told of: {parts:?}"), || {
            mesh.log("controller").lines().any(|line| parts.iter().all(|part| line.contains(part)))
        });
        eventually("the server is reached all the same", reached);
    }
}
