use std::sync::Arc;

use super::*;
use crate::model::{Flow, SpiffeId, Verdict};
use crate::policy::evaluate::evaluate;
use crate::policy::objects::parse;

fn mesh(trust_domain: &str) -> MeshContext {
    MeshContext { root_namespace: "istio-system".to_owned(), trust_domain: trust_domain.parse().unwrap() }
}

fn object(metadata: &str, spec: &str) -> AuthorizationPolicy {
    let text = format!("{{metadata: {metadata}, spec: {spec}}}");
    parse(serde_yaml_ng::Deserializer::from_str(&text)).unwrap()
}

fn compiled_at(metadata: &str, spec: &str) -> Compiled {
    authorization(&object(metadata, spec), &mesh("cluster.local")).unwrap()
}

fn compiled(spec: &str) -> Compiled {
    compiled_at("{name: p, namespace: shop}", spec)
}

fn policy(spec: &str) -> Authorization {
    let compiled = compiled(spec);
    assert_eq!(compiled.problems, [], "{spec}");
    compiled.authorization.unwrap()
}

#[track_caller]
fn refused(spec: &str, message: &str) {
    let error = authorization(&object("{name: p, namespace: shop}", spec), &mesh("cluster.local")).expect_err("it compiled");
    assert_eq!(error.to_string(), format!("AuthorizationPolicy shop/p: {message}"));
}

/// Where problems are, and what stands there.
fn places(compiled: &Compiled) -> Vec<(&str, &str)> {
    compiled.problems.iter().map(|problem| (problem.field.as_str(), problem.value.as_str())).collect()
}

/// Who of `shop/cart`, `pay/bill` and a client without identity may connect from 10.1.2.3 to 10.9.8.7:80, and who to port 81.
fn admitted(compiled: &Compiled) -> [bool; 6] {
    let id = |text: &str| -> Option<SpiffeId> { Some(format!("spiffe://cluster.local/ns/{text}").parse().unwrap()) };
    let policies = compiled.authorization.iter().cloned().map(Arc::new).collect();
    let may = |source_identity: Option<SpiffeId>, port: u16| {
        let (source, destination) = ("10.1.2.3:4711".parse().unwrap(), ([10, 9, 8, 7], port).into());
        evaluate(&Flow { source_identity, source, destination }, &policies, &[], false).verdict.allowed()
    };
    let (cart, bill) = (id("shop/sa/cart"), id("pay/sa/bill"));
    [may(cart.clone(), 80), may(bill.clone(), 80), may(None, 80), may(cart, 81), may(bill, 81), may(None, 81)]
}

const ALL: [bool; 6] = [true; 6];
const NONE: [bool; 6] = [false; 6];

#[test]
fn a_policy_without_rules_matches_nothing_and_an_empty_rule_everything() {
    for (spec, expected) in [
        ("~", NONE),
        ("{}", NONE),
        ("{action: ALLOW, rules: []}", NONE),
        ("{rules: [{}]}", ALL),
        ("{action: DENY, rules: [{}]}", NONE),
        ("{action: AUDIT}", ALL),
        ("{action: AUDIT, rules: [{}]}", ALL),
    ] {
        let compiled = compiled(spec);
        assert_eq!((admitted(&compiled), places(&compiled)), (expected, vec![]), "{spec}");
    }
}

#[test]
fn a_deny_without_rules_denies_nothing_and_is_reported() {
    let compiled = compiled("{action: DENY}");
    assert_eq!((admitted(&compiled), places(&compiled)), (ALL, vec![("spec.rules", "")]));
}

#[test]
fn every_source_field_admits_who_it_says_and_its_negation_the_others() {
    let (cart_only, bill_only) = ([true, false, false, true, false, false], [false, true, false, false, true, false]);
    let (known, all_but_cart) = ([true, true, false, true, true, false], [false, true, true, false, true, true]);
    let unknown = [false, false, true, false, false, true];
    for (source, expected) in [
        ("principals: ['cluster.local/ns/shop/sa/cart']", cart_only),
        ("notPrincipals: ['cluster.local/ns/shop/sa/cart']", all_but_cart),
        ("principals: ['cluster.local/ns/shop/*']", cart_only),
        ("notPrincipals: ['*/sa/cart']", all_but_cart),
        ("principals: ['*']", known),
        ("notPrincipals: ['*']", unknown),
        ("namespaces: [shop]", cart_only),
        ("notNamespaces: [shop]", all_but_cart),
        ("namespaces: ['p*', nowhere]", bill_only),
        ("namespaces: ['*hop']", cart_only),
        ("notNamespaces: ['*']", unknown),
        ("namespaces: ['*'], notNamespaces: [pay]", cart_only),
        ("serviceAccounts: [cart]", cart_only),
        ("notServiceAccounts: [cart]", all_but_cart),
        ("serviceAccounts: [pay/bill]", bill_only),
        ("serviceAccounts: [bill]", NONE),
        ("ipBlocks: [10.1.2.3]", ALL),
        ("ipBlocks: [10.1.0.0/16, 'fd00::/8']", ALL),
        ("ipBlocks: [10.2.0.0/16, 'fd00::1']", NONE),
        ("notIpBlocks: [10.1.0.0/16]", NONE),
        ("notIpBlocks: [10.2.0.0/16]", ALL),
        ("ipBlocks: [10.1.2.3], namespaces: [pay]", bill_only),
    ] {
        let negated = expected.map(|admitted| !admitted);
        let allow = policy(&format!("{{rules: [{{from: [{{source: {{{source}}}}}]}}]}}"));
        let deny = policy(&format!("{{action: DENY, rules: [{{from: [{{source: {{{source}}}}}]}}]}}"));
        for (authorization, expected) in [(allow, expected), (deny, negated)] {
            let action = authorization.action;
            let compiled = Compiled { authorization: Some(authorization), selector: BTreeMap::new(), problems: vec![] };
            assert_eq!(admitted(&compiled), expected, "{action:?} {source}");
        }
    }
}

#[test]
fn every_operation_field_and_condition_admits_what_it_says() {
    let (port_80, port_81) = ([true, true, true, false, false, false], [false, false, false, true, true, true]);
    let (cart, others) = ([true, false, false, true, false, false], [false, true, true, false, true, true]);
    for (rule, expected) in [
        ("to: [{operation: {ports: ['80']}}]", port_80),
        ("to: [{operation: {notPorts: ['80', '443']}}]", port_81),
        ("to: [{operation: {ports: ['80']}}, {operation: {ports: ['81']}}]", ALL),
        ("to: [{operation: {ports: ['80'], notPorts: ['80']}}]", NONE),
        ("when: [{key: destination.port, values: ['81']}]", port_81),
        ("when: [{key: destination.port, notValues: ['81']}]", port_80),
        ("when: [{key: destination.ip, values: [10.9.0.0/16]}]", ALL),
        ("when: [{key: destination.ip, notValues: [10.9.8.7]}]", NONE),
        ("when: [{key: source.ip, values: [10.1.2.3]}]", ALL),
        ("when: [{key: source.ip, notValues: [10.0.0.0/8]}]", NONE),
        ("when: [{key: source.namespace, values: ['sho*']}]", cart),
        ("when: [{key: source.namespace, notValues: [shop]}]", others),
        ("when: [{key: source.principal, values: ['*/sa/cart']}]", cart),
        ("when: [{key: source.principal, notValues: ['*/sa/cart']}]", others),
        ("when: [{key: source.serviceAccount, values: [shop/cart]}]", cart),
        ("when: [{key: source.serviceAccount, notValues: [cart]}]", others),
        ("when: [{key: source.namespace, values: ['*'], notValues: [pay]}]", cart),
        ("when: [{key: source.namespace, values: [shop]}, {key: source.namespace, values: [pay]}]", NONE),
        ("from: [{source: {namespaces: [shop]}}, {source: {namespaces: [pay]}}]", [true, true, false, true, true, false]),
        (
            "from: [{source: {namespaces: [shop]}}], to: [{operation: {ports: ['80']}}], when: [{key: source.ip, values: [10.1.2.3]}]",
            [true, false, false, false, false, false],
        ),
    ] {
        let compiled = compiled(&format!("{{rules: [{{{rule}}}]}}"));
        assert_eq!((admitted(&compiled), places(&compiled)), (expected, vec![]), "{rule}");
    }
}

#[test]
fn rules_are_alternatives() {
    let spec = "{rules: [{from: [{source: {namespaces: [pay]}}]}, {to: [{operation: {ports: ['81']}}]}]}";
    assert_eq!(admitted(&compiled(spec)), [false, true, false, true, true, true]);
}

#[test]
fn a_rule_with_a_condition_on_http_never_allows_and_always_denies() {
    for (part, field, value) in [
        ("to: [{operation: {hosts: [a, b]}}]", "to[0].operation.hosts", "a, b"),
        ("to: [{operation: {notHosts: [a]}}]", "to[0].operation.notHosts", "a"),
        ("to: [{operation: {methods: [GET]}}]", "to[0].operation.methods", "GET"),
        ("to: [{operation: {notMethods: [GET]}}]", "to[0].operation.notMethods", "GET"),
        ("to: [{operation: {paths: [/a]}}]", "to[0].operation.paths", "/a"),
        ("to: [{operation: {notPaths: [/a]}}]", "to[0].operation.notPaths", "/a"),
        ("from: [{source: {requestPrincipals: ['*']}}]", "from[0].source.requestPrincipals", "*"),
        ("from: [{source: {notRequestPrincipals: ['*']}}]", "from[0].source.notRequestPrincipals", "*"),
        ("from: [{source: {remoteIpBlocks: [10.0.0.0/8]}}]", "from[0].source.remoteIpBlocks", "10.0.0.0/8"),
        ("from: [{source: {notRemoteIpBlocks: [10.0.0.0/8]}}]", "from[0].source.notRemoteIpBlocks", "10.0.0.0/8"),
        ("from: [{source: {trustDomains: [td]}}]", "from[0].source.trustDomains", "td"),
        ("from: [{source: {notTrustDomains: [td]}}]", "from[0].source.notTrustDomains", "td"),
        ("when: [{key: 'request.headers[x]', values: [y]}]", "when[0].key", "request.headers[x]"),
        ("when: [{key: 'request.auth.claims[iss]', notValues: [y]}]", "when[0].key", "request.auth.claims[iss]"),
        ("when: [{key: remote.ip, values: [10.0.0.1]}]", "when[0].key", "remote.ip"),
        ("when: [{key: connection.sni, values: [y]}]", "when[0].key", "connection.sni"),
        ("when: [{key: experimental.envoy.filters.a, values: [y]}]", "when[0].key", "experimental.envoy.filters.a"),
        ("when: [{key: source.principals, values: [y]}]", "when[0].key", "source.principals"),
    ] {
        let place = format!("spec.rules[0].{field}");
        for (action, expected) in [("ALLOW", NONE), ("DENY", NONE), ("AUDIT", ALL), ("CUSTOM", NONE)] {
            let compiled = compiled(&format!("{{action: {action}, rules: [{{{part}}}]}}"));
            assert_eq!(admitted(&compiled), expected, "{action} {part}");
            assert_eq!(places(&compiled).last(), Some(&(place.as_str(), value)), "{action} {part}");
        }
        let rules = compiled(&format!("{{action: AUDIT, rules: [{{{part}}}]}}")).authorization.unwrap().rules;
        assert_eq!(rules, [], "an AUDIT rule that cannot be answered never matches");
    }
}

#[test]
fn the_rest_of_a_deny_rule_with_http_conditions_still_counts() {
    let only_80 = [false, false, false, true, true, true];
    for rule in [
        "to: [{operation: {ports: ['80'], methods: [POST]}}]",
        "to: [{operation: {ports: ['80']}}], from: [{source: {requestPrincipals: ['*']}}]",
        "to: [{operation: {ports: ['80']}}], when: [{key: 'request.headers[x]', values: [y]}]",
    ] {
        assert_eq!(admitted(&compiled(&format!("{{action: DENY, rules: [{{{rule}}}]}}"))), only_80, "{rule}");
    }
    let either = "{action: DENY, rules: [{to: [{operation: {methods: [POST]}}, {operation: {ports: ['80']}}]}]}";
    assert_eq!(admitted(&compiled(either)), NONE, "one alternative may always match");
}

#[test]
fn only_the_allow_rule_with_http_conditions_is_lost() {
    let spec =
        "{rules: [{to: [{operation: {methods: [GET]}}, {operation: {ports: ['81']}}]}, {to: [{operation: {ports: ['80']}}]}]}";
    let compiled = compiled(spec);
    assert_eq!(admitted(&compiled), [true, true, true, false, false, false]);
    assert_eq!(places(&compiled), [("spec.rules[0].to[0].operation.methods", "GET")]);
    let text = compiled.problems[0].to_string();
    let expected = "spec.rules[0].to[0].operation.methods: `GET` needs HTTP, which agents do not read; the rule never matches";
    assert!(text.starts_with(expected), "{text}");
}

#[test]
fn what_is_empty_never_allows_and_always_denies() {
    for (part, field) in [
        ("from: []", "from"),
        ("to: []", "to"),
        ("from: [{}]", "from[0].source"),
        ("from: [{source: {}}]", "from[0].source"),
        ("from: [{source: {principals: []}}]", "from[0].source"),
        ("from: [{source: {namespaces: [nowhere]}}, {source: {}}]", "from[1].source"),
        ("to: [{operation: {}}]", "to[0].operation"),
        ("to: [{operation: {ports: []}}]", "to[0].operation"),
        ("when: [{key: source.ip}]", "when[0]"),
        ("when: [{key: source.ip, values: [], notValues: []}]", "when[0]"),
    ] {
        for action in ["ALLOW", "DENY"] {
            let compiled = compiled(&format!("{{action: {action}, rules: [{{{part}}}]}}"));
            let fields: Vec<_> = compiled.problems.iter().map(|problem| problem.field.as_str()).collect();
            assert_eq!(fields, [format!("spec.rules[0].{field}")], "{action} {part}");
            assert_eq!(admitted(&compiled), NONE, "{action} {part}");
        }
    }
}

#[test]
fn no_match_without_fields_and_no_clause_without_matches_comes_out() {
    for part in ["from: []", "from: [{}]", "to: [{operation: {paths: [a]}}]", "when: [{key: a.b, values: [c]}]", ""] {
        for action in ["ALLOW", "DENY", "AUDIT"] {
            let rules = compiled(&format!("{{action: {action}, rules: [{{{part}}}]}}")).authorization.unwrap().rules;
            assert!(rules.iter().all(|rule| rule.clauses.is_empty()), "{action} {part}");
        }
    }
}

#[test]
fn custom_denies_what_it_matches_and_is_reported() {
    let spec = "{action: CUSTOM, provider: {name: opa}, rules: [{to: [{operation: {ports: ['80']}}]}]}";
    let compiled = compiled(spec);
    assert_eq!(admitted(&compiled), [false, false, false, true, true, true]);
    assert_eq!(places(&compiled), [("spec.action", "CUSTOM (provider \"opa\")")]);
    let stray = super::tests::compiled("{action: ALLOW, provider: {name: opa}, rules: [{}]}");
    assert_eq!((admitted(&stray), places(&stray)), (ALL, vec![("spec.provider", "opa")]));
}

#[test]
fn scope_follows_namespace_and_selector() {
    let (shop, root) = ("{name: p, namespace: shop}", "{name: p, namespace: istio-system}");
    for (metadata, spec, expected) in [
        (shop, "{}", Scope::Namespace),
        (shop, "{selector: {}}", Scope::Namespace),
        (shop, "{selector: {matchLabels: {app: web}}}", Scope::WorkloadSelector),
        (root, "{}", Scope::Global),
        (root, "{selector: {matchLabels: {}}}", Scope::Global),
        (root, "{selector: {matchLabels: {app: web}}}", Scope::WorkloadSelector),
    ] {
        assert_eq!(compiled_at(metadata, spec).authorization.unwrap().scope, expected, "{metadata} {spec}");
    }
}

#[test]
fn a_selector_selects_in_its_namespace_and_the_root_ones_everywhere() {
    let labels = |pairs: &[(&str, &str)]| pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
    let web: BTreeMap<String, String> = labels(&[("app", "web"), ("tier", "front")]);
    let selector = "{selector: {matchLabels: {app: web, tier: front}}}";
    let (mesh, shop) = (mesh("cluster.local"), compiled(selector));
    assert!(shop.selects(&mesh, "shop", &web));
    assert!(!shop.selects(&mesh, "pay", &web));
    assert!(!shop.selects(&mesh, "shop", &labels(&[("app", "web")])));
    assert!(!shop.selects(&mesh, "shop", &labels(&[("app", "api"), ("tier", "front")])));
    let root = compiled_at("{name: p, namespace: istio-system}", selector);
    assert!(root.selects(&mesh, "shop", &web) && root.selects(&mesh, "istio-system", &web));
    assert!(!root.selects(&mesh, "shop", &labels(&[])));
    assert!(!compiled("{}").selects(&mesh, "shop", &web), "it applies without being named");
}

#[test]
fn a_policy_for_a_waypoint_applies_to_no_workload_and_is_reported() {
    let one = compiled("{targetRef: {kind: Gateway, group: gateway.networking.k8s.io, name: wp}, rules: [{}]}");
    assert_eq!((one.authorization.is_none(), places(&one)), (true, vec![("spec.targetRef", "Gateway/wp")]));
    let more = compiled("{action: DENY, targetRefs: [{kind: Service, name: a}, {kind: Service, name: b}], rules: [{}]}");
    assert_eq!(places(&more), [("spec.targetRefs[0]", "Service/a"), ("spec.targetRefs[1]", "Service/b")]);
    assert_eq!(admitted(&more), ALL);
    let both = "{selector: {matchLabels: {app: web}}, targetRefs: [{kind: Service, name: a}]}";
    refused(both, "spec.selector and spec.targetRefs are both set: keep one of them");
}

#[test]
fn bad_values_are_named_with_their_field() {
    let (port, range) = ("a port from 1 to 65535", "an address or a range such as 10.0.0.0/8 or fd00::/8");
    let account = "a service account, `name` or `namespace/name`";
    let name = "a name, optionally with a `*` at one end";
    for (rule, field, value, expected) in [
        ("to: [{operation: {ports: ['80', '0']}}]", "to[0].operation.ports[1]", "0", port),
        ("to: [{operation: {notPorts: [http]}}]", "to[0].operation.notPorts[0]", "http", port),
        ("when: [{key: destination.port, values: ['65536']}]", "when[0].values[0]", "65536", port),
        ("from: [{source: {ipBlocks: [10.0.0.0/33]}}]", "from[0].source.ipBlocks[0]", "10.0.0.0/33", range),
        ("from: [{source: {notIpBlocks: [localhost]}}]", "from[0].source.notIpBlocks[0]", "localhost", range),
        ("when: [{key: source.ip, notValues: ['*']}]", "when[0].notValues[0]", "*", range),
        ("when: [{key: destination.ip, values: ['']}]", "when[0].values[0]", "", range),
        ("from: [{}, {source: {serviceAccounts: [a/b/c]}}]", "from[1].source.serviceAccounts[0]", "a/b/c", account),
        ("from: [{source: {notServiceAccounts: ['*']}}]", "from[0].source.notServiceAccounts[0]", "*", account),
        ("when: [{key: source.serviceAccount, values: [a/]}]", "when[0].values[0]", "a/", account),
        ("from: [{source: {namespaces: ['']}}]", "from[0].source.namespaces[0]", "", name),
    ] {
        refused(&format!("{{rules: [{{{rule}}}]}}"), &format!("spec.rules[0].{field}: `{value}` is not {expected}"));
    }
    let wildcard = "spec.selector.matchLabels.app: `w*` is not a label's value (wildcards are not supported)";
    refused("{selector: {matchLabels: {app: 'w*'}}}", wildcard);
}

#[test]
fn cluster_local_in_a_principal_stands_for_the_meshs_trust_domain() {
    let matcher = |trust_domain: &str, principal: &str| {
        let spec = format!("{{rules: [{{from: [{{source: {{notPrincipals: ['{principal}']}}}}]}}]}}");
        let compiled = authorization(&object("{name: p}", &spec), &mesh(trust_domain)).unwrap();
        compiled.authorization.unwrap().rules[0].clauses[0].matches[0].not_principals[0].clone()
    };
    let (exact, prefix) = (|text: &str| StringMatch::Exact(text.into()), |text: &str| StringMatch::Prefix(text.into()));
    for (trust_domain, principal, expected) in [
        ("example.org", "cluster.local/ns/a/sa/b", exact("example.org/ns/a/sa/b")),
        ("example.org", "cluster.local/ns/a/*", prefix("example.org/ns/a/")),
        ("example.org", "cluster.local/*", prefix("example.org/")),
        ("example.org", "spiffe://cluster.local/ns/a/sa/b", exact("example.org/ns/a/sa/b")),
        ("example.org", "other.org/ns/a/sa/b", exact("other.org/ns/a/sa/b")),
        ("example.org", "cluster.locale/ns/a/sa/b", exact("cluster.locale/ns/a/sa/b")),
        ("example.org", "cluster.local*", prefix("cluster.local")),
        ("example.org", "*cluster.local/ns/a/sa/b", StringMatch::Suffix("cluster.local/ns/a/sa/b".into())),
        ("example.org", "*", StringMatch::Presence),
        ("cluster.local", "cluster.local/ns/a/sa/b", exact("cluster.local/ns/a/sa/b")),
    ] {
        assert_eq!(matcher(trust_domain, principal), expected, "{principal} in {trust_domain}");
    }
}

#[test]
fn principals_written_as_spiffe_ids_are_read_and_reported() {
    let compiled = compiled("{rules: [{from: [{source: {principals: ['spiffe://cluster.local/ns/shop/sa/cart']}}]}]}");
    assert_eq!(admitted(&compiled), [true, false, false, true, false, false]);
    let place = "spec.rules[0].from[0].source.principals[0]";
    assert_eq!(places(&compiled), [(place, "spiffe://cluster.local/ns/shop/sa/cart")]);
}

#[test]
fn a_star_that_is_no_wildcard_is_reported() {
    let compiled = compiled("{rules: [{from: [{source: {namespaces: ['s*p'], principals: ['*/sa/*']}}]}]}");
    let fields: Vec<_> = places(&compiled).into_iter().map(|(_, value)| value).collect();
    assert_eq!((fields, admitted(&compiled)), (vec!["s*p", "*/sa/*"], NONE));
}

#[test]
fn an_annotation_makes_a_dry_run() {
    let dry_run = |annotations: &str| {
        let compiled = compiled_at(&format!("{{name: p, annotations: {{{annotations}}}}}"), "{}");
        (compiled.authorization.unwrap().dry_run, compiled.problems.len())
    };
    for (annotations, expected) in [
        ("", (false, 0)),
        ("culvert.dev/dry-run: 'true'", (true, 0)),
        ("istio.io/dry-run: 'true'", (true, 0)),
        ("istio.io/dry-run: 'false', culvert.dev/dry-run: 'true'", (true, 0)),
        ("istio.io/dry-run: 'false'", (false, 0)),
        ("culvert.dev/dry-run: 'yes'", (false, 1)),
        ("example.org/dry-run: 'true'", (false, 0)),
    ] {
        assert_eq!(dry_run(annotations), expected, "{annotations}");
    }
}

#[test]
fn contradicting_policies_of_one_scope_deny() {
    let (yes, no) = (policy("{rules: [{}]}"), policy("{action: DENY, rules: [{}]}"));
    let flow = Flow { source_identity: None, source: ([10, 0, 0, 1], 1).into(), destination: ([10, 0, 0, 2], 2).into() };
    for policies in [[yes.clone(), no.clone()], [no, yes]] {
        let verdict = evaluate(&flow, &policies.into_iter().map(Arc::new).collect(), &[], false).verdict;
        assert_eq!(verdict, Verdict::Deny { by: Some("shop/p".into()) });
    }
}
