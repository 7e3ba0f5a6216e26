//! Waiting: the API server tells of each change, and a condition is looked at after each.

use std::collections::BTreeMap;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Instant;

use serde_json::Value;

use super::{Cluster, PATIENCE, kubectl};

impl Cluster {
    /// Waits until a condition holds of all objects of a kind in a namespace, and gives them.
    ///
    /// # Panics
    /// When it does not in time; the objects are in the message.
    pub fn wait_for(&self, what: &str, namespace: &str, kind: &str, condition: impl Fn(&[Value]) -> bool) -> Vec<Value> {
        let deadline = Instant::now() + PATIENCE;
        let mut objects = BTreeMap::new();
        loop {
            // A watch ends when the API server does; the next one begins with all objects anew.
            objects.clear();
            let watch = Watch::start(namespace, kind);
            loop {
                match watch.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                    Ok(event) => change(&mut objects, event),
                    Err(RecvTimeoutError::Disconnected) if Instant::now() < deadline => break,
                    Err(_) => panic!("not within {} s: {what}; {kind} of {namespace}: {objects:#?}", PATIENCE.as_secs()),
                }
                let now: Vec<Value> = objects.values().cloned().collect();
                if condition(&now) {
                    return now;
                }
            }
        }
    }
}

fn change(objects: &mut BTreeMap<String, Value>, event: Value) {
    let object = &event["object"];
    let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    if event["type"] == "DELETED" {
        objects.remove(&name);
    } else {
        objects.insert(name, object.clone());
    }
}

/// A watch that is running.
struct Watch {
    child: Child,
    events: Receiver<Value>,
}

impl Watch {
    fn start(namespace: &str, kind: &str) -> Self {
        let mut command = kubectl();
        command.args(["--namespace", namespace, "get", kind, "--watch", "--output-watch-events", "--output=json"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("kubectl starts");
        let output = child.stdout.take().expect("a piped output");
        let (sender, events) = channel();
        std::thread::spawn(move || {
            for event in serde_json::Deserializer::from_reader(output).into_iter::<Value>().map_while(Result::ok) {
                if sender.send(event).is_err() {
                    return;
                }
            }
        });
        Self { child, events }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _status = self.child.wait();
    }
}
