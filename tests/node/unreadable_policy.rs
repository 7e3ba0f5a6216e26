//! Promise: a policy that makes no sense opens nothing: what it may have closed is closed until it is put right, and that is told.

use harness::{Mesh, Pod, PodSpec, app, eventually};

const PORT: u16 = 8080;

struct Lab {
    mesh: Mesh,
    chosen: Pod,
    other: Pod,
    member: Pod,
    outsider: Pod,
}

impl Lab {
    fn new() -> Self {
        let mut mesh = Mesh::start();
        let [chosen, other] = ["chosen", "other"].map(|name| {
            let pod = mesh.pod(PodSpec { name, namespace: "shop", node: 1, enrolled: true });
            app::server(&pod.netns, PORT, app::echo);
            pod
        });
        let [member, outsider] = [("member", true), ("outsider", false)]
            .map(|(name, enrolled)| mesh.pod(PodSpec { name, namespace: "street", node: 0, enrolled }));
        let lab = Self { mesh, chosen, other, member, outsider };
        lab.becomes("everything is open at first", [true; 4]);
        lab
    }

    /// Who reaches whom: the member and the outsider the chosen pod, then the other.
    fn reached(&self) -> [bool; 4] {
        let [one, two] = [&self.chosen, &self.other]
            .map(|to| [&self.member, &self.outsider].map(|from| app::converse(&from.netns, to.at(false, PORT), "hello").is_ok()));
        [one[0], one[1], two[0], two[1]]
    }

    fn becomes(&self, what: &str, wanted: [bool; 4]) {
        eventually(&format!("{what}: {wanted:?}"), || self.reached() == wanted);
    }

    fn apply(&self, kind: &str, spec: &str) {
        self.apply_as("rule", kind, spec);
    }

    fn apply_as(&self, name: &str, kind: &str, spec: &str) {
        let text = format!(
            "apiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{{spec}}}\n"
        );
        self.mesh.apply(name, &text);
    }

    fn told(&self, words: &str) {
        eventually(&format!("the controller says: {words}"), || {
            self.mesh.log("controller").lines().any(|line| line.contains("ERROR") && line.contains(words))
        });
    }

    fn remove(&self) {
        self.mesh.delete("rule");
        self.becomes("without the policy all is open", [true; 4]);
    }
}

const CHOSEN: &str = "selector: {matchLabels: {app: chosen}}";

#[test]
fn a_denial_that_cannot_be_read_closes_what_it_selects_and_a_good_one_takes_its_place() {
    let lab = Lab::new();
    lab.apply(
        "AuthorizationPolicy",
        &format!("{CHOSEN}, action: DENY, rules: [{{from: [{{sauce: {{namespaces: [street]}}}}]}}]"),
    );
    lab.becomes("what it selects is closed, and nothing else", [false, false, true, true]);
    lab.told("what it selects is closed to everybody");
    lab.apply(
        "AuthorizationPolicy",
        &format!("{CHOSEN}, action: DENY, rules: [{{from: [{{source: {{namespaces: [street]}}}}]}}]"),
    );
    lab.becomes("the good one denies whom it names", [false, true, true, true]);
    lab.apply("AuthorizationPolicy", &format!("{CHOSEN}, action: DENNY, rules: [{{}}]"));
    eventually("the controller names the action", || lab.mesh.log("controller").contains("DENNY"));
    assert_eq!(lab.reached(), [false, true, true, true], "what it said before stays in force");
    lab.remove();
    lab.apply("AuthorizationPolicy", "selector: [chosen], action: DENY, rules: [{}]");
    lab.becomes("whom it selects cannot be told: the whole namespace is closed", [false; 4]);
    lab.remove();
}

#[test]
fn an_allowance_that_cannot_be_read_allows_nobody() {
    let lab = Lab::new();
    lab.apply("AuthorizationPolicy", &format!("{CHOSEN}, rules: [{{to: [{{operation: {{ports: [http]}}}}]}}]"));
    lab.becomes("it allows nobody", [false, false, true, true]);
    lab.told("it allows nobody");
    let allow = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: allow, namespace: shop}\n\
                 spec: {rules: [{from: [{source: {namespaces: [street]}}]}]}\n";
    lab.mesh.apply("allow", allow);
    lab.becomes("those whom others allow are let in", [true, false, true, false]);
    lab.mesh.delete("allow");
    lab.remove();
}

#[test]
fn a_mode_that_cannot_be_read_is_strict() {
    let lab = Lab::new();
    lab.apply("PeerAuthentication", &format!("{CHOSEN}, mtls: {{mode: STRICTLY}}"));
    lab.becomes("what it selects takes mutual TLS only", [true, false, true, true]);
    lab.told("what it selects takes mutual TLS only");
    lab.apply("PeerAuthentication", &format!("{CHOSEN}, mtls: {{mode: PERMISSIVE}}"));
    lab.becomes("the good one takes its place", [true; 4]);
    lab.remove();
    // Under a name of its own: what the other said would stay in force until its end is known.
    lab.apply_as("wide", "PeerAuthentication", "mtls: STRICT");
    lab.becomes("the whole namespace takes mutual TLS only", [true, false, true, false]);
    lab.mesh.delete("wide");
    lab.becomes("without the policy all is open", [true; 4]);
}

#[test]
fn a_file_of_which_nothing_can_be_read_is_told_of_loudly() {
    let lab = Lab::new();
    lab.mesh.apply("rule", "kind: AuthorizationPolicy\n  spec: [\n");
    lab.told("if there is a policy in it, that is not in force");
}
