//! What passes the links of a node: a pod in the node's network namespace keeps every frame, on the way between the nodes as on the links of
//! the node's pods, and is asked what it saw. It needs nothing of the machine that the tests run on.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};

use super::pod::{IMAGE, PodSpec};
use super::{Cluster, kubectl};

const NAMESPACE: &str = "culvert-test-wire";

/// One direction of a TCP connection, on one link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The link's name.
    pub interface: String,
    /// Who sends, with the port.
    pub source: String,
    /// Who receives, with the port.
    pub destination: String,
    /// Whether its first bytes are a TLS record of a handshake.
    pub tls: bool,
    /// Those first bytes, a few of them.
    pub first: Vec<u8>,
}

/// A capture that is running on a node.
#[derive(Debug)]
pub struct NodeCapture {
    pod: String,
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Cluster {
    /// Starts to keep what passes the links of a node.
    ///
    /// # Panics
    /// When it cannot.
    #[must_use]
    pub fn capture(&self, node: &str) -> NodeCapture {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("wire-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        self.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}));
        self.wait_for("the service account of captures", NAMESPACE, "serviceaccounts", |accounts| !accounts.is_empty());
        let mut pod = PodSpec::new(NAMESPACE, &name, node);
        pod.more = json!({
            "hostNetwork": true,
            "tolerations": [{"operator": "Exists"}],
            "containers": [{"name": "app", "image": IMAGE, "args": ["pause"], "securityContext": {"privileged": true}}],
        });
        self.pods(&[pod]);
        let mut command = kubectl();
        command.args(["--namespace", NAMESPACE, "exec", "--stdin", &name, "--", "/app", "capture"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("kubectl starts");
        let (input, output) = (child.stdin.take(), BufReader::new(child.stdout.take().expect("a piped output")));
        let mut capture = NodeCapture { pod: name, child, input, output };
        assert_eq!(capture.line(), "capturing", "{} does not capture", capture.pod);
        capture
    }
}

impl NodeCapture {
    /// Whether a frame holds this text in plain sight.
    pub fn shows(&mut self, text: &str) -> bool {
        self.ask(json!({"find": text}))["frames"].as_u64() != Some(0)
    }

    /// The directions of TCP connections in which something was said, in the order of their first frames.
    ///
    /// # Panics
    /// When the capture has ended.
    pub fn flows(&mut self) -> Vec<Flow> {
        let flows = self.ask(json!("flows"));
        let flows = flows.as_array().expect("flows are a list");
        let text = |flow: &Value, field: &str| flow[field].as_str().unwrap_or_default().to_owned();
        let read = |flow: &Value| Flow {
            interface: text(flow, "interface"),
            source: text(flow, "source"),
            destination: text(flow, "destination"),
            tls: flow["tls"] == true,
            first: serde_json::from_value(flow["first"].clone()).unwrap_or_default(),
        };
        flows.iter().map(read).collect()
    }

    fn ask(&mut self, question: Value) -> Value {
        let input = self.input.as_mut().expect("the capture has not been dropped");
        writeln!(input, "{question}").expect("the capture goes on");
        serde_json::from_str(&self.line()).expect("the capture answers in JSON")
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("the capture speaks UTF-8");
        line.trim_end().to_owned()
    }
}

impl Drop for NodeCapture {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ended_already = self.child.kill();
        let _status = self.child.wait();
        let _gone_already = kubectl().args(["--namespace", NAMESPACE, "delete", "pod", &self.pod, "--wait=false"]).output();
    }
}
