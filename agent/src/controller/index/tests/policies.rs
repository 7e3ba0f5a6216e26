use super::{World, pod};
use crate::controller::index::ResourceKind;
use crate::controller::source::Kind;
use crate::proto::culvert;
use crate::proto::security::{Authorization, Scope};
use prost::Message;

fn policy(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{spec}}}\n"
    )
}

fn modes(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{spec}}}\n"
    )
}

fn mode_of(world: &World, name: &str) -> Option<culvert::PeerAuthentication> {
    let pod = world.pod(name);
    let extension = pod.extensions.iter().find(|extension| extension.name == "peer_authentication")?;
    let config = extension.config.as_ref().unwrap();
    assert_eq!(config.type_url, crate::proto::PEER_AUTHENTICATION_TYPE);
    Some(culvert::PeerAuthentication::decode(config.value.as_slice()).unwrap())
}

#[test]
fn policies_with_a_selector_are_listed_by_the_workloads_that_they_select() {
    let selector = "selector: {matchLabels: {app: web}}";
    let mut world = World::new(
        &(pod("web", "10.1.0.2")
            + &pod("db", "10.1.0.3")
            + &policy("shop", "own", selector)
            + &policy("istio-system", "everywhere", selector)
            + &policy("elsewhere", "other", selector)
            + &policy("shop", "namespace", "")),
    );
    assert_eq!(world.pod("web").authorization_policies, ["istio-system/everywhere", "shop/own"]);
    assert!(world.pod("db").authorization_policies.is_empty());
    world.apply(&policy("shop", "own", "selector: {matchLabels: {app: db}}"));
    assert_eq!(world.pod("web").authorization_policies, ["istio-system/everywhere"]);
    assert_eq!(world.pod("db").authorization_policies, ["shop/own"]);
    world.apply(&policy("shop", "own", ""));
    assert!(world.pod("db").authorization_policies.is_empty());
    world.remove(Kind::AuthorizationPolicy, "istio-system", "everywhere");
    assert!(world.pod("web").authorization_policies.is_empty());
}

#[test]
fn a_policy_is_published_with_its_scope_and_removed() {
    let mut world = World::new(&(policy("istio-system", "mesh", "") + &policy("shop", "own", "action: DENY")));
    let scope = |world: &World, name: &str| {
        let value = world.resources.get(&(ResourceKind::Authorization, name.to_owned()))?;
        Some(Authorization::decode(&*value.value).unwrap().scope())
    };
    assert_eq!(scope(&world, "istio-system/mesh"), Some(Scope::Global));
    assert_eq!(scope(&world, "shop/own"), Some(Scope::Namespace));
    world.remove(Kind::AuthorizationPolicy, "shop", "own");
    assert_eq!(scope(&world, "shop/own"), None);
}

#[test]
fn modes_travel_with_the_workload_and_the_default_is_left_out() {
    let mut world = World::new(&pod("web", "10.1.0.2"));
    assert_eq!(mode_of(&world, "web"), None);
    world.apply(&modes("istio-system", "mesh", "mtls: {mode: STRICT}"));
    assert_eq!(mode_of(&world, "web").unwrap().mode(), culvert::peer_authentication::Mode::Strict);
    let ports = "selector: {matchLabels: {app: web}}, mtls: {mode: DISABLE}, portLevelMtls: {8080: {mode: STRICT}, 9090: {mode: PERMISSIVE}}";
    world.apply(&modes("shop", "web", ports));
    let resolved = mode_of(&world, "web").unwrap();
    assert_eq!(resolved.mode(), culvert::peer_authentication::Mode::Disable);
    assert_eq!(resolved.ports, [(8080, 1), (9090, 0)].into());
    world.remove(Kind::PeerAuthentication, "shop", "web");
    world.remove(Kind::PeerAuthentication, "istio-system", "mesh");
    assert_eq!(mode_of(&world, "web"), None);
}

#[test]
fn contradicting_modes_of_one_scope_are_told_once() {
    let mut world = World::new(&(modes("shop", "a", "mtls: {mode: STRICT}") + &modes("shop", "b", "mtls: {mode: DISABLE}")));
    assert_eq!(world.warnings.len(), 1, "{:?}", world.warnings);
    assert!(world.warnings[0].contains("shop/b") && world.warnings[0].contains("shop/a"), "{:?}", world.warnings);
    world.apply(&modes("other", "c", "mtls: {mode: STRICT}"));
    assert_eq!(world.warnings.len(), 1);
}

#[test]
fn what_a_policy_cannot_enforce_is_told_with_its_origin() {
    let world = World::new(&policy("shop", "http", "rules: [{to: [{operation: {methods: [GET]}}]}]"));
    assert!(world.warnings.iter().any(|warning| warning.contains("test: AuthorizationPolicy shop/http")), "{:?}", world.warnings);
}
