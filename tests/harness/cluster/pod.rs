//! Pods with the tests' application in them, and what that application sees.

use serde_json::{Value, json};

use super::{Cluster, kubectl, run};

/// The application's image.
pub const IMAGE: &str = "localhost/culvert-test-app:1";

/// A pod to be made.
#[derive(Clone, Debug)]
pub struct PodSpec<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its name and label `app`.
    pub name: &'a str,
    /// Its node.
    pub node: &'a str,
    /// What the application shall do.
    pub arguments: &'a [&'a str],
    /// Its labels, beside `app`.
    pub labels: &'a [(&'a str, &'a str)],
    /// What else its specification says: fields of it, merged over ours.
    pub more: Value,
}

impl<'a> PodSpec<'a> {
    /// A pod that serves echo on 8080, HTTP on 8081 and gRPC's health on 8082, and from which others can be connected to.
    #[must_use]
    pub fn new(namespace: &'a str, name: &'a str, node: &'a str) -> Self {
        Self { namespace, name, node, arguments: &["serve"], labels: &[], more: Value::Null }
    }

    /// The object.
    #[must_use]
    pub fn object(&self) -> Value {
        let mut labels = json!({"app": self.name});
        for (key, value) in self.labels {
            labels[*key] = json!(value);
        }
        let mut object = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": self.name, "namespace": self.namespace, "labels": labels},
            "spec": {
                "nodeName": self.node,
                "terminationGracePeriodSeconds": 1,
                "containers": [{"name": "app", "image": IMAGE, "args": self.arguments}],
            },
        });
        merge(&mut object["spec"], &self.more);
        object
    }
}

/// Puts the fields of `more` over those of `object`, into the depth of maps.
fn merge(object: &mut Value, more: &Value) {
    match (object, more) {
        (_, Value::Null) => {}
        (Value::Object(object), Value::Object(more)) => {
            more.iter().for_each(|(key, value)| merge(object.entry(key).or_insert(Value::Null), value));
        }
        (object, more) => *object = more.clone(),
    }
}

/// What a client saw of its conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The client's own address, as it sees it.
    pub local: String,
    /// The server's address, as the client sees it.
    pub peer: String,
    /// What an echo server said first: the client's address, as the server saw it.
    pub client: String,
    /// What it said after.
    pub answer: String,
}

/// Why a client could not have its conversation: the name of its error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal(pub String);

impl Cluster {
    /// Makes pods, waits until all are ready, and gives their addresses.
    ///
    /// # Panics
    /// When they do not get ready in time.
    pub fn pods(&self, pods: &[PodSpec<'_>]) -> Vec<String> {
        let objects: Vec<Value> = pods.iter().map(PodSpec::object).collect();
        self.apply(&json!({"apiVersion": "v1", "kind": "List", "items": objects}));
        for pod in pods {
            self.wait_condition(pod.namespace, &format!("pod/{}", pod.name), "Ready");
        }
        pods.iter().map(|pod| self.pod_address(pod.namespace, pod.name)).collect()
    }

    /// A pod's address.
    ///
    /// # Panics
    /// When it has none yet.
    #[must_use]
    pub fn pod_address(&self, namespace: &str, name: &str) -> String {
        self.get(namespace, "pod", name)["status"]["podIP"].as_str().expect("a pod that runs has an address").to_owned()
    }

    /// Runs a program in a pod.
    ///
    /// # Errors
    /// What it printed, when it failed.
    ///
    /// # Panics
    /// When kubectl cannot be started.
    pub fn exec(&self, namespace: &str, pod: &str, words: &[&str]) -> Result<String, String> {
        run(kubectl().args(["--namespace", namespace, "exec", pod, "--"]).args(words), "")
    }

    /// Has a pod say something to an echo server, and gives what it saw.
    ///
    /// # Errors
    /// As the application sees it.
    ///
    /// # Panics
    /// When the pod's application does not tell what it saw.
    pub fn converse(&self, namespace: &str, pod: &str, server: &str, say: &str) -> Result<Seen, Refusal> {
        self.converse_within(namespace, pod, server, say, 0)
    }

    /// The same, tried again for some seconds: for what is to hold soon.
    ///
    /// # Errors
    /// As the application sees it in the end.
    ///
    /// # Panics
    /// When the pod's application does not tell what it saw.
    pub fn converse_within(&self, namespace: &str, pod: &str, server: &str, say: &str, seconds: u32) -> Result<Seen, Refusal> {
        let told = self.exec(namespace, pod, &["/app", "connect", server, "--say", say, "--retry-for", &seconds.to_string()]);
        seen(&told.unwrap_or_else(|failure| failure))
    }
}

/// Reads what the application tells of a connection.
///
/// # Errors
/// The error that it tells of.
///
/// # Panics
/// When it tells of neither an answer nor an error.
pub fn seen(told: &str) -> Result<Seen, Refusal> {
    let line = told.lines().find(|line| line.starts_with('{'));
    let told: Value =
        line.and_then(|line| serde_json::from_str(line).ok()).unwrap_or_else(|| panic!("the application tells: {told}"));
    if let Some(error) = told["error"].as_str() {
        return Err(Refusal(error.to_owned()));
    }
    let text = |field: &str| told[field].as_str().unwrap_or_default().to_owned();
    let answer = text("answer");
    let (client, answer) = answer.split_once('\n').unwrap_or((&answer, ""));
    Ok(Seen { local: text("local"), peer: text("peer"), client: client.to_owned(), answer: answer.to_owned() })
}
