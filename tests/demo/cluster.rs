//! `cargo xtask demo --cluster`: a Kubernetes cluster of two nodes on which Culvert is installed, and two applications that know nothing of
//! it: the same conversation before they join the mesh and after, as they and as the wire see it, and then what policies make of it.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use harness::cluster::{CULVERT, Flow, NodeCapture, PodSpec, Refusal, Seen, TestNamespace};
use harness::{Cluster, eventually_within};
use serde_json::{Value, json};

use crate::report::Report;

const SHOP: &str = "shop";
const LEGACY: &str = "legacy";
const PATIENCE: Duration = Duration::from_secs(30);
/// Istio's own: <https://istio.io/latest/docs/tasks/security/authentication/authn-policy/>.
const STRICT: &str = "\
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata:
  name: default
  namespace: shop
spec:
  mtls:
    mode: STRICT
";
const CART_ONLY: &str = "\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: cart-only
  namespace: shop
spec:
  selector:
    matchLabels:
      app: web
  rules:
  - from:
    - source:
        principals: [\"cluster.local/ns/shop/sa/cart\"]
";

/// Shows all steps, and gives whether all held. The applications stay if they are to be kept.
pub(crate) fn show(culvert: &Path, keep: bool) -> bool {
    let mut report = Report::new();
    report.text("Culvert on Kubernetes: two nodes, two applications, and what the wire between them sees");
    let mut demo = Demo::set_up(&report);
    demo.before(&mut report);
    demo.join(&mut report);
    demo.strict(&mut report);
    demo.principals(&mut report);
    check_installation(culvert, &mut report);
    let passed = report.finish();
    if keep {
        std::mem::forget(demo.namespaces);
        report.text(&how_to_use());
    }
    passed
}

/// All that is looked at.
struct Demo {
    cluster: Cluster,
    nodes: [String; 2],
    cart: String,
    web: String,
    wire: NodeCapture,
    namespaces: [TestNamespace; 2],
}

impl Demo {
    fn set_up(report: &Report) -> Self {
        let cluster = Cluster;
        let all = cluster.nodes();
        let nodes = [all[0].clone(), all[1].clone()];
        let namespaces = [cluster.namespace(SHOP, &[]), cluster.namespace(LEGACY, &[])];
        let pod = |namespace, name, node: usize| {
            cluster.account(namespace, name);
            let mut pod = PodSpec::new(namespace, name, &nodes[node]);
            pod.more = json!({"serviceAccountName": name});
            pod
        };
        let pods = [pod(SHOP, "cart", 0), pod(SHOP, "web", 1), pod(SHOP, "other", 0), pod(LEGACY, "visitor", 0)];
        cluster.service(SHOP, "web", "web", false);
        let addresses = cluster.pods(&pods);
        show_pods(cluster, report);
        let wire = cluster.capture(&nodes[0]);
        let [cart, web] = [0, 1].map(|pod: usize| addresses[pod].clone());
        Self { cluster, nodes, cart, web, wire, namespaces }
    }

    /// A pod asks the service, which may have to become known first.
    fn ask(&self, namespace: &str, pod: &str, say: &str) -> Result<Seen, Refusal> {
        self.cluster.converse_within(namespace, pod, &format!("web.{SHOP}.svc.cluster.local:8080"), say, 10)
    }

    /// Waits until a pod is refused.
    fn refused(&self, namespace: &str, pod: &str) -> Refusal {
        let mut refusal = None;
        let mut is_refused = || {
            let server = format!("{}:8080", self.web);
            refusal = self.cluster.converse(namespace, pod, &server, "let me in").err();
            refusal.is_some()
        };
        eventually_within(PATIENCE, &format!("{pod} is refused"), &mut is_refused);
        refusal.expect("it was refused")
    }

    /// What has passed from cart's pod to web's.
    fn between(&mut self) -> Vec<Flow> {
        let (from, to) = (format!("{}:", self.cart), format!("{}:", self.web));
        self.wire.flows().into_iter().filter(|flow| flow.source.starts_with(&from) && flow.destination.starts_with(&to)).collect()
    }

    /// Step 1: without Culvert.
    fn before(&mut self, report: &mut Report) {
        const SECRET: &str = "card 4000 0012 3456 7899";
        report.step(1, "two applications outside of the mesh: what is said is to be read on the wire");
        let seen = self.ask(SHOP, "cart", SECRET).expect("web serves");
        let flows = self.between();
        all_sides(report, &seen, flows.last());
        report.check_equal(&seen.answer, &SECRET.to_owned(), "web has heard it, and says it back");
        report.check(self.wire.shows(SECRET), "the wire shows it in plain sight", "it does not");
    }

    /// Step 2: one label.
    fn join(&mut self, report: &mut Report) {
        const SECRET: &str = "card 5105 1051 0510 5100";
        report.step(2, "kubectl label namespace shop culvert.dev/mesh=enabled: the same applications, which go on running");
        self.cluster.kubectl(&["label", "namespace", SHOP, "culvert.dev/mesh=enabled"]);
        let mut tries = 0;
        eventually_within(PATIENCE, "the pods are in the mesh", || {
            tries += 1;
            let say = format!("is this in the clear, {tries}?");
            self.ask(SHOP, "cart", &say).is_ok() && !self.wire.shows(&say)
        });
        let plain = |flows: &[Flow]| flows.iter().filter(|flow| !flow.tls || !flow.destination.ends_with(":15008")).count();
        let before = plain(&self.between());
        let seen = self.ask(SHOP, "cart", SECRET).expect("web serves");
        let flows = self.between();
        all_sides(report, &seen, flows.iter().rfind(|flow| flow.tls));
        let logged = [(0, "outbound"), (1, "inbound")].map(|(node, direction)| self.logged(node, direction));
        for (line, node) in logged.iter().zip(&self.nodes) {
            let [direction, from, to, how] =
                ["direction", "src.identity", "dst.identity", "security"].map(|field| line[field].as_str().unwrap_or_default());
            report.text(&format!("{node}'s agent  {direction}: {from} to {to}, {how}"));
        }
        report.check_equal(&seen.answer, &SECRET.to_owned(), "web has heard it, and says it back");
        report.check(!self.wire.shows(SECRET), "the wire shows nothing of it", "it does");
        let tunnels = flows.iter().filter(|flow| flow.tls).count();
        let nothing_else = tunnels > 0 && plain(&flows) == before;
        report.check(
            nothing_else,
            "between the pods there is nothing but TLS any more, to port 15008",
            format_args!("{flows:?}"),
        );
        let client = seen.client.split(':').next().unwrap_or_default().to_owned();
        report.check_equal(&client, &self.cart, "web sees cart's own address");
        for line in &logged {
            let identities = ["src.identity", "dst.identity"].map(|field| line[field].as_str().unwrap_or_default().to_owned());
            let wanted = ["cart", "web"].map(|account| format!("spiffe://cluster.local/ns/{SHOP}/sa/{account}"));
            report.check_equal(&identities, &wanted, "each end has proved its SPIFFE ID to the other");
        }
    }

    /// Step 3: plaintext is refused.
    fn strict(&mut self, report: &mut Report) {
        report.step(3, "kubectl apply of a PeerAuthentication with mode STRICT: who is not in the mesh is kept out");
        let visitor = self.ask(LEGACY, "visitor", "good day").map(|seen| seen.answer);
        report.check_equal(&visitor, &Ok("good day".to_owned()), "before, web takes plaintext of a pod outside of the mesh");
        self.cluster.apply_text(STRICT);
        let refusal = self.refused(LEGACY, "visitor");
        report.check_equal(&refusal.0.as_str(), &"ConnectionRefused", "now that pod is refused");
        let cart = self.ask(SHOP, "cart", "it is me").map(|seen| seen.answer);
        report.check_equal(&cart, &Ok("it is me".to_owned()), "cart is served as before");
    }

    /// Step 4: who in the mesh may come.
    fn principals(&mut self, report: &mut Report) {
        report.step(4, "kubectl apply of an AuthorizationPolicy: of the mesh, cart alone is let in");
        let other = self.ask(SHOP, "other", "good day").map(|seen| seen.answer);
        report.check_equal(&other, &Ok("good day".to_owned()), "before, another pod of the mesh is served");
        self.cluster.apply_text(CART_ONLY);
        let refusal = self.refused(SHOP, "other");
        report.check_equal(&refusal.0.as_str(), &"ConnectionReset", "now its connections are reset");
        let cart = self.ask(SHOP, "cart", "it is me").map(|seen| seen.answer);
        report.check_equal(&cart, &Ok("it is me".to_owned()), "cart is served as before");
        let denied = |line: &Value| line["reason"] == "policy_denied";
        let mut line = None;
        eventually_within(PATIENCE, "the refusal is logged", || {
            line = self.cluster.agent_log(&self.nodes[1]).into_iter().rfind(denied);
            line.is_some()
        });
        let line = line.unwrap_or_default();
        report.text(&format!("{}'s agent  {} is refused: {}", self.nodes[1], line["src.identity"], line["error"]));
    }

    /// The access log's line of the last connection from cart to web.
    fn logged(&self, node: usize, direction: &str) -> Value {
        let mut line = None;
        let of_cart = |line: &Value| {
            line["direction"] == direction && line["src.identity"].as_str().is_some_and(|id| id.ends_with("/sa/cart"))
        };
        eventually_within(PATIENCE, "the connection is logged", || {
            line = self.cluster.agent_log(&self.nodes[node]).into_iter().rfind(of_cart);
            line.is_some()
        });
        line.unwrap_or_default()
    }
}

fn show_pods(cluster: Cluster, report: &Report) {
    let mut rows = vec![["namespace", "pod", "node", "address", "service account"].map(str::to_owned).to_vec()];
    for namespace in [CULVERT, SHOP, LEGACY] {
        for pod in cluster.list(namespace, "pods") {
            let fields =
                [&pod["metadata"]["name"], &pod["spec"]["nodeName"], &pod["status"]["podIP"], &pod["spec"]["serviceAccountName"]];
            let fields = fields.map(|field| field.as_str().unwrap_or_default().to_owned());
            rows.push([&[namespace.to_owned()], fields.as_slice()].concat());
        }
    }
    report.table(&rows);
}

/// A conversation, from all sides.
fn all_sides(report: &Report, seen: &Seen, flow: Option<&Flow>) {
    let row = |who: &str, saw: String| vec![who.to_owned(), saw];
    let wire = flow.map_or_else(
        || "nothing".to_owned(),
        |flow| format!("{} to {}: {}", flow.source, flow.destination, if flow.tls { "TLS" } else { "plaintext" }),
    );
    let first = flow.map_or_else(String::new, |flow| {
        let letter = |byte: &u8| if byte.is_ascii_graphic() || *byte == b' ' { char::from(*byte) } else { '.' };
        let bytes: Vec<String> = flow.first.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("  {}  {}", bytes.join(" "), flow.first.iter().map(letter).collect::<String>())
    });
    report.table(&[
        row("who", "saw".to_owned()),
        row("cart", format!("an answer from {}", seen.peer)),
        row("web", format!("a client at {}", seen.client)),
        row("wire", wire),
        row("", first),
    ]);
}

/// Step 5: what `culvert check` says.
fn check_installation(culvert: &Path, report: &mut Report) {
    report.step(5, "culvert check: what an operator is told of the cluster");
    let kubeconfig = std::env::var_os("KUBECONFIG").unwrap_or_default();
    match Command::new(culvert).args(["check", "--kubeconfig"]).arg(kubeconfig).output() {
        Ok(output) => {
            report.text(&String::from_utf8_lossy(&output.stdout));
            report.check(output.status.success(), "nothing is wrong with it", String::from_utf8_lossy(&output.stderr));
        }
        Err(error) => report.check(false, "culvert check runs", error),
    }
}

fn how_to_use() -> String {
    let kubeconfig = std::env::var("KUBECONFIG").unwrap_or_default();
    let kubectl = std::env::var("CULVERT_KUBECTL").unwrap_or_else(|_on_the_path| "kubectl".to_owned());
    format!(
        "\nEverything goes on running. For example:
  export KUBECONFIG={kubeconfig}
  {kubectl} get pods --all-namespaces --output wide
  {kubectl} --namespace {SHOP} exec cart -- /app connect web:8080 --say hello
  {kubectl} --namespace {CULVERT} logs daemonset/culvert-agent
To remove it:
  cargo xtask demo --cluster --remove"
    )
}
