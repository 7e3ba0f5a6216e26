use super::super::objects::{MutualTls, Port, Selector};
use super::*;

const ROOT: &str = "istio-system";

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

struct Draft(PeerAuthenticationPolicy);

fn policy(namespace: &str, name: &str) -> Draft {
    let mut object = PeerAuthenticationPolicy::default();
    object.metadata.namespace = Some(namespace.to_owned());
    object.metadata.name = Some(name.to_owned());
    object.spec = Some(PeerAuthenticationSpec::default());
    Draft(object)
}

impl Draft {
    fn spec(&mut self) -> &mut PeerAuthenticationSpec {
        self.0.spec.get_or_insert_default()
    }

    fn mode(mut self, mode: MutualTlsMode) -> Self {
        self.spec().mtls = Some(MutualTls { mode });
        self
    }

    fn selecting(mut self, pairs: &[(&str, &str)]) -> Self {
        self.spec().selector = Some(Selector { match_labels: labels(pairs) });
        self
    }

    fn port(mut self, port: u16, mode: MutualTlsMode) -> Self {
        self.spec().port_level_mtls.insert(Port(port), MutualTls { mode });
        self
    }

    fn created(mut self, second: u32) -> Self {
        let time = format!("\"2026-01-01T00:00:{second:02}Z\"");
        self.0.metadata.creation_timestamp = Some(serde_json::from_str(&time).unwrap());
        self
    }
}

/// The modes of the workload `app=web` in `shop`, whatever the order that the objects come in.
#[track_caller]
fn resolved_for_web(drafts: impl IntoIterator<Item = Draft>) -> PeerAuthentication {
    let mut objects: Vec<_> = drafts.into_iter().map(|draft| draft.0).collect();
    let web = labels(&[("app", "web"), ("tier", "front")]);
    let found = resolve(&objects, "shop", &web, ROOT);
    objects.reverse();
    assert_eq!(PeerAuthenticationIndex::new(&objects, ROOT).resolve("shop", &web), found, "the order of objects shows");
    found
}

fn port_modes(modes: &[(u16, Mode)]) -> BTreeMap<u16, Mode> {
    modes.iter().copied().collect()
}

use MutualTlsMode::{Disable, Permissive, Strict, Unset};

const ALL: [MutualTlsMode; 4] = [Unset, Disable, Permissive, Strict];

fn as_mode(mode: MutualTlsMode) -> Option<Mode> {
    resolved(MutualTls { mode })
}

#[test]
fn the_narrowest_scope_that_sets_a_mode_wins() {
    let scoped = |mode: MutualTlsMode, draft: Draft| draft.mode(mode);
    // None stands for a scope without an object.
    let choices = || ALL.into_iter().map(Some).chain([None]);
    for mesh in choices() {
        for namespace in choices() {
            for workload in choices() {
                let drafts = [
                    mesh.map(|mode| scoped(mode, policy(ROOT, "mesh"))),
                    namespace.map(|mode| scoped(mode, policy("shop", "namespace"))),
                    workload.map(|mode| scoped(mode, policy("shop", "workload").selecting(&[("app", "web")]))),
                ];
                let expected = [workload, namespace, mesh].into_iter().flatten().find_map(as_mode).unwrap_or(Mode::Permissive);
                let found = resolved_for_web(drafts.into_iter().flatten());
                assert_eq!(found.mode, expected, "mesh {mesh:?}, namespace {namespace:?}, workload {workload:?}");
                assert!(found.ports.is_empty());
            }
        }
    }
}

#[test]
fn a_port_mode_wins_over_every_scope_and_unset_inherits() {
    for workload in ALL {
        for port in ALL {
            let mesh = policy(ROOT, "mesh").mode(Strict);
            let web = policy("shop", "web").selecting(&[("app", "web")]).mode(workload).port(8080, port);
            let found = resolved_for_web([mesh, web]);
            let whole = as_mode(workload).unwrap_or(Mode::Strict);
            assert_eq!(found.mode_of(8080), as_mode(port).unwrap_or(whole), "workload {workload:?}, port {port:?}");
            assert_eq!(found.mode_of(80), whole);
        }
    }
}

#[test]
fn port_modes_without_a_selector_are_ignored_and_reported() {
    for namespace in [ROOT, "shop"] {
        let draft = policy(namespace, "wide").mode(Strict).port(8080, Disable).port(9090, Permissive);
        let problems = check(&draft.0, ROOT);
        assert_eq!(problems.len(), 1);
        assert_eq!((problems[0].field.as_str(), problems[0].value.as_str()), ("spec.portLevelMtls", "8080, 9090"));
        assert_eq!(resolved_for_web([draft]), PeerAuthentication { mode: Mode::Strict, ports: BTreeMap::new() });
    }
}

#[test]
fn a_selector_in_the_root_namespace_selects_nothing_and_is_reported() {
    let draft = policy(ROOT, "chosen").selecting(&[("app", "web")]).mode(Strict);
    let problems = check(&draft.0, ROOT);
    assert_eq!(problems.len(), 1);
    assert_eq!((problems[0].field.as_str(), problems[0].value.as_str()), ("spec.selector.matchLabels", "app=web"));
    assert_eq!(resolve([&draft.0], ROOT, &labels(&[("app", "web")]), ROOT).mode, Mode::Permissive);
    assert_eq!(resolved_for_web([draft]).mode, Mode::Permissive);
}

#[test]
fn a_wildcard_in_a_selector_selects_nothing_and_is_reported() {
    let draft = policy("shop", "wild").selecting(&[("app", "w*")]).mode(Strict);
    assert_eq!(check(&draft.0, ROOT).len(), 1);
    assert_eq!(resolved_for_web([draft]).mode, Mode::Permissive);
}

#[test]
fn what_is_in_order_has_no_problems() {
    let draft = policy("shop", "web").selecting(&[("app", "web")]).mode(Strict).port(80, Disable);
    assert_eq!(check(&draft.0, ROOT), []);
    assert_eq!(check(&policy(ROOT, "mesh").mode(Strict).0, ROOT), []);
    assert_eq!(check(&PeerAuthenticationPolicy::default(), ROOT), []);
}

#[test]
fn an_empty_selector_means_the_whole_namespace() {
    let draft = policy("shop", "all").selecting(&[]).mode(Strict).port(80, Disable);
    assert_eq!(resolved_for_web([draft]), PeerAuthentication { mode: Mode::Strict, ports: BTreeMap::new() });
}

#[test]
fn other_namespaces_and_labels_are_left_alone() {
    let other = policy("pay", "namespace").mode(Strict);
    let others = policy("pay", "web").selecting(&[("app", "web")]).mode(Strict);
    let differing = policy("shop", "api").selecting(&[("app", "api")]).mode(Strict);
    let further = policy("shop", "canary").selecting(&[("app", "web"), ("track", "canary")]).mode(Strict);
    assert_eq!(resolved_for_web([other, others, differing, further]).mode, Mode::Permissive);
}

#[test]
fn pods_of_the_root_namespace_follow_the_mesh() {
    let mesh = policy(ROOT, "mesh").mode(Strict);
    assert_eq!(resolve([&mesh.0], ROOT, &BTreeMap::new(), ROOT).mode, Mode::Strict);
}

#[test]
fn of_contradicting_objects_the_oldest_wins_then_the_first_by_name() {
    let scopes: [(&str, &[(&str, &str)]); 3] = [(ROOT, &[]), ("shop", &[]), ("shop", &[("app", "web")])];
    for (namespace, selector) in scopes {
        let draft = |name: &str, mode| policy(namespace, name).selecting(selector).mode(mode);
        let mode = |a: Draft, b: Draft| resolved_for_web([a, b]).mode;
        assert_eq!(mode(draft("b", Strict).created(1), draft("a", Disable).created(2)), Mode::Strict);
        assert_eq!(mode(draft("b", Disable).created(2), draft("a", Strict).created(1)), Mode::Strict);
        assert_eq!(mode(draft("b", Disable).created(1), draft("a", Strict).created(1)), Mode::Strict);
        assert_eq!(mode(draft("b", Disable), draft("a", Strict)), Mode::Strict);
        // Only the oldest counts, even where it leaves the mode open.
        assert_eq!(mode(draft("a", Unset).created(1), draft("b", Strict).created(2)), Mode::Permissive);
    }
}

#[test]
fn the_oldest_of_differing_selectors_that_select_a_workload_wins() {
    let tier = policy("shop", "tier").selecting(&[("tier", "front")]).mode(Strict).port(80, Disable).created(5);
    let app = policy("shop", "app").selecting(&[("app", "web")]).mode(Disable).port(81, Strict).created(6);
    let elder = policy("shop", "elder").selecting(&[("app", "api")]).mode(Permissive).created(1);
    let found = resolved_for_web([tier, app, elder]);
    assert_eq!(found, PeerAuthentication { mode: Mode::Strict, ports: port_modes(&[(80, Mode::Disable)]) });
}

#[test]
fn objects_without_effect_beside_an_older_one_are_named() {
    let drafts = [
        policy("shop", "young").mode(Disable).created(2),
        policy("shop", "old").mode(Strict).created(1),
        policy(ROOT, "b").mode(Strict),
        policy(ROOT, "a").mode(Strict),
        policy("pay", "alone").mode(Strict),
        policy("pay", "web-young").selecting(&[("app", "web")]).mode(Strict).created(2),
        policy("pay", "web-old").selecting(&[("app", "web")]).mode(Disable).created(1),
        policy("pay", "tier").selecting(&[("tier", "front")]).mode(Disable).created(1),
        policy("shop", "web").selecting(&[("app", "web")]).mode(Strict).created(3),
    ];
    let index = PeerAuthenticationIndex::new(drafts.iter().map(|draft| &draft.0), ROOT);
    let overruled = |policy: &str, by: &str| Overruled { policy: policy.to_owned(), by: by.to_owned() };
    let expected = [
        overruled("istio-system/b", "istio-system/a"),
        overruled("pay/web-young", "pay/web-old"),
        overruled("shop/young", "shop/old"),
    ];
    let mut found = index.overruled().to_vec();
    found.sort_by(|one, other| one.policy.cmp(&other.policy));
    assert_eq!(found, expected);
    assert_eq!(index.resolve("pay", &labels(&[("app", "web")])).mode, Mode::Disable);
}

#[test]
fn ten_thousand_objects_resolve_by_label() {
    let drafts: Vec<_> = (0..10_000)
        .map(|number| policy("shop", &format!("p{number:05}")).selecting(&[("app", &format!("app-{number}"))]).mode(Strict))
        .collect();
    let index = PeerAuthenticationIndex::new(drafts.iter().map(|draft| &draft.0), ROOT);
    for number in (0..10_000).step_by(7) {
        assert_eq!(index.resolve("shop", &labels(&[("app", &format!("app-{number}"))])).mode, Mode::Strict);
    }
    assert_eq!(index.resolve("shop", &labels(&[("app", "app-10000")])).mode, Mode::Permissive);
}

#[test]
fn no_older_object_overrules_what_stands_in_for_one_of_which_it_cannot_be_told_what_it_selects() {
    let older = || policy("shop", "default").mode(MutualTlsMode::Permissive).created(1);
    let younger = || policy("shop", "odd").mode(MutualTlsMode::Strict).created(2);
    let mut stand_in = younger();
    stand_in.spec().stands_in = true;
    assert_eq!(resolved_for_web([older(), younger()]).mode, Mode::Permissive);
    assert_eq!(resolved_for_web([older(), stand_in]).mode, Mode::Strict);
}
