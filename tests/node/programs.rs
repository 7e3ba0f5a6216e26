//! Promise: real programs run unmodified, and what they say to each other is not in sight between the nodes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use harness::{Mesh, Pod, PodSpec, Program, eventually};
use serde_json::Value;

const MARKER: &str = "marker-of-the-programs";
const MIB: usize = 1 << 20;

in_each_form!(nginx_serves_curl);

/// Two pods of the mesh on two nodes, of which the server accepts the client and nobody else; and two that it does not accept.
struct Stage {
    mesh: Mesh,
    server: Pod,
    client: Pod,
    /// In the mesh, but another identity.
    stranger: Pod,
    /// Not in the mesh.
    outsider: Pod,
    directory: Directory,
}

impl Stage {
    fn new(forms: [&str; 2]) -> Self {
        let mut mesh = Mesh::start_in(forms);
        mesh.mode("shop", "STRICT");
        mesh.apply(
            "only-client",
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: only-client, namespace: shop}\n\
             spec: {selector: {matchLabels: {app: server}}, action: ALLOW, \
             rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/client]}}]}]}\n",
        );
        let mut pod = |name, node, enrolled| mesh.pod(PodSpec { name, namespace: "shop", node, enrolled });
        let (server, client) = (pod("server", 1, true), pod("client", 0, true));
        let (stranger, outsider) = (pod("stranger", 0, true), pod("outsider", 0, false));
        Self { mesh, server, client, stranger, outsider, directory: Directory::new() }
    }

    /// Starts a server in its pod, and waits until `ready` says that the client reaches it.
    fn serve(&self, program: &str, arguments: &[&str], ready: impl Fn(&Pod) -> bool) -> Program {
        let mut command = self.server.netns.command(program);
        command.args(arguments);
        let program = Program::start(command, &self.directory.0);
        eventually("the server is reached", || ready(&self.client));
        self.check_denials(ready);
        program
    }

    /// Nobody else reaches it.
    fn check_denials(&self, reached: impl Fn(&Pod) -> bool) {
        assert!(!reached(&self.stranger), "another identity is served");
        assert!(!reached(&self.outsider), "plaintext is served");
    }

    /// Runs `f`, and checks that what it did was not in sight.
    fn unseen<T>(&self, f: impl FnOnce() -> T) -> T {
        let mut capture = self.mesh.capture_between_nodes();
        let value = f();
        capture.finish();
        assert!(!capture.shows(MARKER.as_bytes()), "in plaintext between the nodes");
        value
    }

    fn path(&self, name: &str) -> String {
        self.directory.0.join(name).display().to_string()
    }
}

/// A directory that goes when it is dropped. Everybody may read it: some servers drop root.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("culvert-programs-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).expect("a directory");
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _gone_already = fs::remove_dir_all(&self.0);
    }
}

fn succeeds(pod: &Pod, program: &str, arguments: &[&str]) -> bool {
    pod.netns.output(program, arguments).status.success()
}

/// nginx as Debian has it, with files to serve.
fn configure_nginx(stage: &Stage) -> (String, String) {
    let directory = stage.directory.0.display().to_string();
    let files = stage.path("files");
    fs::create_dir_all(&files).expect("a directory");
    fs::write(Path::new(&files).join("hello"), MARKER).expect("a file");
    // Bytes without a pattern that a compression or a repeated block could hide a fault behind.
    let random = fs::File::open("/dev/urandom").expect("Linux has it");
    let mut large = fs::File::create(Path::new(&files).join("large")).expect("a file");
    std::io::copy(&mut std::io::Read::take(random, 100 * MIB as u64), &mut large).expect("a file");
    let temporary =
        ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map(|name| format!("{name}_temp_path {directory}/{name};\n"));
    let configuration = format!(
        "user root;\nworker_processes 2;\ndaemon off;\npid {directory}/pid;\nerror_log stderr warn;\nevents {{}}\n\
         http {{\n{}access_log {directory}/requests.log;\nserver {{ listen 80; listen [::]:80; root {files}; }}\n}}\n",
        temporary.concat()
    );
    let file = stage.path("nginx.conf");
    fs::write(&file, configuration).expect("a file");
    (directory, file)
}

fn nginx_serves_curl(forms: [&str; 2]) {
    let stage = Stage::new(forms);
    let (directory, configuration) = configure_nginx(&stage);
    let url = |v6: bool, path: &str| format!("http://{}/{path}", stage.server.at(v6, 80));
    let _nginx = stage.serve("nginx", &["-p", &directory, "-e", "stderr", "-c", &configuration], |pod| {
        succeeds(pod, "curl", &["-sSf", "-m", "5", &url(false, "hello")])
    });
    stage.unseen(|| {
        for v6 in [false, true] {
            assert_eq!(stage.client.netns.succeed("curl", &["-sSf", &url(v6, "hello")]), MARKER);
        }
    });
    let requests = fs::read_to_string(stage.path("requests.log")).expect("a log");
    for address in [stage.client.v4, stage.client.v6] {
        assert!(
            requests.lines().any(|line| line.starts_with(&format!("{address} "))),
            "nginx has not seen {address}:\n{requests}"
        );
    }
    // Three requests, one connection.
    let hello = url(false, "hello");
    let connects = stage.client.netns.succeed(
        "curl",
        &["-sSf", "-o", "/dev/null", "-o", "/dev/null", "-o", "/dev/null", "-w", "%{num_connects} ", &hello, &hello, &hello],
    );
    assert_eq!(connects, "1 0 0 ");
    // A hundred megabytes, and then again by several at once.
    let wanted = stage.server.netns.succeed("sha256sum", &[&stage.path("files/large")]);
    let wanted = wanted.split(' ').next().expect("a checksum");
    let large = url(false, "large");
    let one = stage.client.netns.succeed("sh", &["-c", &format!("curl -sSf {large} | sha256sum")]);
    assert_eq!(one.split(' ').next(), Some(wanted), "the download is damaged");
    let four = format!("for n in 1 2 3 4; do (curl -sSf {large} | sha256sum) & done; wait");
    let four = stage.client.netns.succeed("sh", &["-c", &four]);
    let sums: Vec<_> = four.lines().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(sums, [wanted; 4], "a download beside others is damaged");
    // Many short ones in parallel, each its own connection.
    let many = format!("{}?[1-64]", url(false, "hello"));
    let many = stage.client.netns.succeed(
        "curl",
        &["-sSf", "-Z", "--parallel-max", "16", "-H", "Connection: close", "-o", "/dev/null", "-w", "%{http_code}\n", &many],
    );
    assert_eq!(many.lines().filter(|code| *code == "200").count(), 64, "{many}");
}

#[test]
fn iperf3_measures_both_directions_with_several_streams() {
    let stage = Stage::new(["auto", "auto"]);
    let server = stage.server.v4.to_string();
    let run = |more: &[&str]| {
        let arguments = [&["-c", &server, "-J", "--connect-timeout", "4000", "--extra-data", MARKER], more].concat();
        let output = stage.client.netns.output("iperf3", &arguments);
        let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
        assert!(output.status.success() && report["error"].is_null(), "{more:?}: {}", report["error"]);
        report["end"].clone()
    };
    let short = ["-c", &server, "-n", "1M", "--connect-timeout", "4000"];
    let _server = stage.serve("iperf3", &["-s"], |pod| succeeds(pod, "iperf3", &short));
    stage.unseen(|| run(&["-n", "16M"]));
    const WANTED: u64 = 128 << 20;
    for more in [&["-n", "128M"][..], &["-n", "128M", "-R"], &["-n", "128M", "-P", "4"], &["-n", "128M", "-P", "4", "-R"]] {
        let end = run(more);
        let bytes = |sum: &str| end[sum]["bytes"].as_u64().unwrap_or_default();
        let (sent, received) = (bytes("sum_sent"), bytes("sum_received"));
        assert!(sent >= WANTED, "{more:?}: sent {sent}");
        // What is on its way when the sender stops is not waited for by iperf3 itself.
        assert!(received > WANTED / 2 && received <= sent, "{more:?}: received {received} of {sent}");
    }
    let both = run(&["-t", "2", "--bidir"]);
    assert!(both["sum_received"]["bytes"].as_u64() > Some(0) && both["sum_received_bidir_reverse"]["bytes"].as_u64() > Some(0));
}

/// Makes a database cluster, as the postgres user: the server refuses root. Gives the server's program and its directory.
fn initialise_postgres(stage: &Stage) -> (PathBuf, String) {
    let versions = fs::read_dir("/usr/lib/postgresql").expect("PostgreSQL is installed");
    let programs = versions.flatten().map(|version| version.path().join("bin")).find(|bin| bin.join("initdb").is_file());
    let programs = programs.expect("PostgreSQL is installed");
    let data = stage.path("postgres");
    fs::create_dir_all(&data).expect("a directory");
    let run = |words: &[&str]| {
        let output = Command::new(words[0]).args(&words[1..]).output().expect("installed");
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    run(&["chown", "postgres:", &data]);
    let initdb = programs.join("initdb").display().to_string();
    let as_postgres = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"];
    run(&[&as_postgres[..], &[&initdb, "-D", &data, "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]].concat());
    let access = fs::read_to_string(Path::new(&data).join("pg_hba.conf")).expect("a file");
    fs::write(Path::new(&data).join("pg_hba.conf"), access + "host all all all trust\n").expect("a file");
    (programs.join("postgres"), data)
}

#[test]
fn postgresql_serves_psql() {
    let stage = Stage::new(["auto", "auto"]);
    let (postgres, data) = initialise_postgres(&stage);
    let host = stage.server.v4.to_string();
    let base = ["-X", "-At", "-v", "ON_ERROR_STOP=1", "-h", &host, "-U", "postgres"];
    let psql = |commands: &[&str]| {
        let commands = commands.iter().flat_map(|command| ["-c", command]);
        stage.client.netns.succeed("psql", &base.into_iter().chain(commands).collect::<Vec<_>>())
    };
    let server = ["--reuid=postgres", "--regid=postgres", "--clear-groups", &postgres.display().to_string()];
    let options = ["-D", &data, "-k", &data, "-h", "*", "-F"];
    let select_one = [&base[..], &["-c", "select 1"]].concat();
    let reached = |pod: &Pod| succeeds(pod, "env", &[&["PGCONNECT_TIMEOUT=5", "psql"], &select_one[..]].concat());
    let _postgres = stage.serve("setpriv", &[&server[..], &options].concat(), reached);

    assert_eq!(psql(&["select inet_client_addr()"]).trim(), stage.client.v4.to_string(), "the client, as the server sees it");
    let (sent, received) = (stage.path("sent.tsv"), stage.path("received.tsv"));
    let row = |number: usize| format!("{number}\t{MARKER} {number} {}\n", "x".repeat(number % 97));
    fs::write(&sent, (0..5000).map(row).collect::<String>()).expect("a file");
    stage.unseen(|| {
        psql(&["create table goods (id int primary key, name text)"]);
        assert_eq!(psql(&[&format!("\\copy goods from '{sent}'")]).trim(), "COPY 5000");
        assert_eq!(psql(&[&format!("\\copy (select * from goods order by id) to '{received}'")]).trim(), "COPY 5000");
        assert_eq!(psql(&[&format!("select count(*), max(id) from goods where name like '{MARKER}%'")]).trim(), "5000|4999");
    });
    assert!(fs::read(&sent).expect("sent") == fs::read(&received).expect("received"), "the rows are damaged");

    // A connection that waits, and hears of what happens elsewhere.
    let mut listener = stage.client.netns.command("psql");
    listener.args(base).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut listener = listener.spawn().expect("psql is installed");
    let mut commands = listener.stdin.take().expect("piped");
    use std::io::Write as _;
    commands.write_all(b"listen news;\n").expect("psql reads");
    let listening = "select count(*) from pg_stat_activity where query like 'listen news%' and state = 'idle'";
    eventually("psql listens", || psql(&[listening]).trim() == "1");
    std::thread::sleep(std::time::Duration::from_secs(2));
    stage.unseen(|| psql(&[&format!("notify news, '{MARKER}'")]));
    // psql shows what it was told when it has something else to do.
    commands.write_all(b"select 'done';\n").expect("psql reads");
    drop(commands);
    let output = listener.wait_with_output().expect("psql ends");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains(&format!("Asynchronous notification \"news\" with payload \"{MARKER}\" received")), "{output:?}");
}

#[test]
fn redis_serves_its_command_line() {
    let stage = Stage::new(["auto", "auto"]);
    let host = stage.server.v4.to_string();
    let cli = |words: &[&str]| stage.client.netns.succeed("redis-cli", &[&["-h", &host], words].concat());
    let reached = |pod: &Pod| pod.netns.output("redis-cli", &["-h", &host, "ping"]).stdout == b"PONG\n";
    let directory = stage.directory.0.display().to_string();
    let options = ["--bind", "*", "--protected-mode", "no", "--save", "", "--dir", &directory];
    let _redis = stage.serve("redis-server", &options, reached);

    stage.unseen(|| {
        assert_eq!(cli(&["set", "key", MARKER]), "OK\n");
        assert_eq!(cli(&["get", "key"]), format!("{MARKER}\n"));
    });
    assert!(cli(&["client", "list"]).contains(&format!(" addr={}:", stage.client.v4)), "the client, as the server sees it");

    let commands = stage.path("commands");
    fs::write(&commands, (0..20_000).map(|n| format!("SET key:{n} {n}-{}\r\n", "y".repeat(n % 53))).collect::<String>())
        .expect("a file");
    let piped = stage.client.netns.succeed("sh", &["-c", &format!("redis-cli -h {host} --pipe < {commands}")]);
    assert!(piped.contains("errors: 0, replies: 20000"), "{piped}");
    assert_eq!(cli(&["dbsize"]), "20001\n");
    assert_eq!(cli(&["strlen", "key:52"]), format!("{}\n", "52-".len() + 52));

    // One that waits to be told, while another blocks.
    let mut subscriber = stage.client.netns.command("redis-cli");
    subscriber.args(["-h", &host, "subscribe", "news"]);
    let subscriber = Program::start(subscriber, &stage.directory.0);
    let mut waiter = stage.client.netns.command("redis-cli");
    waiter.args(["-h", &host, "blpop", "queue", "0"]);
    let waiter = Program::start(waiter, &stage.directory.0);
    eventually("both wait", || {
        cli(&["pubsub", "numsub", "news"]).ends_with("1\n") && cli(&["client", "list"]).contains("cmd=blpop")
    });
    std::thread::sleep(std::time::Duration::from_secs(2));
    stage.unseen(|| {
        assert_eq!(cli(&["publish", "news", MARKER]), "1\n");
        assert_eq!(cli(&["rpush", "queue", MARKER]), "1\n");
    });
    eventually("both are told", || subscriber.said().contains(MARKER) && waiter.said().contains(MARKER));
}
