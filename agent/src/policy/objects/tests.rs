use super::*;

fn yaml<S: Spec>(text: &str) -> Result<Object<S>, ParseError> {
    parse(serde_yaml_ng::Deserializer::from_str(text))
}

/// The same text, by way of the value that Kubernetes clients hold objects in.
fn json<S: Spec>(text: &str) -> Result<Object<S>, ParseError> {
    let value: serde_json::Value = serde_yaml_ng::from_str(text).unwrap();
    parse(value)
}

fn authorization(spec: &str) -> Result<AuthorizationPolicy, ParseError> {
    yaml(&format!("{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {{name: p}}, spec: {spec}}}"))
}

fn peer_authentication(spec: &str) -> Result<PeerAuthenticationPolicy, ParseError> {
    yaml(&format!("{{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {{name: p}}, spec: {spec}}}"))
}

#[track_caller]
fn refused<S: Spec + std::fmt::Debug>(result: Result<Object<S>, ParseError>, parts: &[&str]) {
    let error = result.expect_err("the object was taken").to_string();
    for part in parts {
        assert!(error.contains(part), "`{error}` does not say `{part}`");
    }
}

const FULL: &str = r#"
apiVersion: security.istio.io/v1beta1
kind: AuthorizationPolicy
metadata: {name: web, namespace: shop, annotations: {istio.io/dry-run: "true"}, creationTimestamp: "2026-01-02T03:04:05Z"}
spec:
  selector: {matchLabels: {app: web}}
  action: DENY
  rules:
  - from:
    - source:
        principals: [p]
        notPrincipals: [np]
        requestPrincipals: [rp]
        notRequestPrincipals: [nrp]
        namespaces: [n]
        notNamespaces: [nn]
        serviceAccounts: [s]
        notServiceAccounts: [ns]
        ipBlocks: [i]
        notIpBlocks: [ni]
        remoteIpBlocks: [r]
        notRemoteIpBlocks: [nr]
    to:
    - operation: {hosts: [h], notHosts: [nh], ports: ["1"], notPorts: ["2"], methods: [m], notMethods: [nm], paths: [x], notPaths: [nx]}
    when:
    - {key: source.ip, values: [a], notValues: [b]}
"#;

#[test]
fn every_field_of_an_authorization_policy_is_read() {
    let object: AuthorizationPolicy = yaml(FULL).unwrap();
    assert_eq!(object, json(FULL).unwrap());
    assert_eq!(object.key(), "shop/web");
    let spec = object.spec.unwrap();
    assert_eq!(spec.action, PolicyAction::Deny);
    assert_eq!(spec.selector.unwrap().match_labels["app"], "web");
    let rule = &spec.rules[0];
    let source = &rule.from.as_ref().unwrap()[0].source;
    let lists = [&source.principals, &source.not_principals, &source.request_principals, &source.not_request_principals];
    assert_eq!(lists.map(|list| list[0].as_str()), ["p", "np", "rp", "nrp"]);
    let lists = [&source.namespaces, &source.not_namespaces, &source.service_accounts, &source.not_service_accounts];
    assert_eq!(lists.map(|list| list[0].as_str()), ["n", "nn", "s", "ns"]);
    let lists = [&source.ip_blocks, &source.not_ip_blocks, &source.remote_ip_blocks, &source.not_remote_ip_blocks];
    assert_eq!(lists.map(|list| list[0].as_str()), ["i", "ni", "r", "nr"]);
    let operation = &rule.to.as_ref().unwrap()[0].operation;
    let lists = [&operation.hosts, &operation.not_hosts, &operation.ports, &operation.not_ports];
    assert_eq!(lists.map(|list| list[0].as_str()), ["h", "nh", "1", "2"]);
    let lists = [&operation.methods, &operation.not_methods, &operation.paths, &operation.not_paths];
    assert_eq!(lists.map(|list| list[0].as_str()), ["m", "nm", "x", "nx"]);
    let (values, not_values) = (vec!["a".to_owned()], vec!["b".to_owned()]);
    assert_eq!(rule.when, [Condition { key: "source.ip".to_owned(), values, not_values }]);
}

#[test]
fn every_field_of_a_peer_authentication_is_read() {
    let spec = r"{selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: DISABLE}, 9: {}}}";
    let spec = peer_authentication(spec).unwrap().spec.unwrap();
    assert_eq!(spec.mtls.unwrap().mode, MutualTlsMode::Strict);
    let modes = spec.port_level_mtls.iter().map(|(port, mtls)| (port.0, mtls.mode));
    assert_eq!(modes.collect::<Vec<_>>(), [(9, MutualTlsMode::Unset), (8080, MutualTlsMode::Disable)]);
}

#[test]
fn ports_are_keys_in_json_too() {
    let text = r#"{"metadata": {"name": "p"}, "spec": {"portLevelMtls": {"8080": {"mode": "PERMISSIVE"}}}}"#;
    let object: PeerAuthenticationPolicy = parse(&mut serde_json::Deserializer::from_str(text)).unwrap();
    let value: PeerAuthenticationPolicy = parse(serde_json::from_str::<serde_json::Value>(text).unwrap()).unwrap();
    assert_eq!(object.spec.as_ref().unwrap().port_level_mtls[&Port(8080)].mode, MutualTlsMode::Permissive);
    assert_eq!(object, value);
}

#[test]
fn what_is_left_out_or_null_has_the_kinds_defaults() {
    assert_eq!(authorization("~").unwrap().spec, None);
    let spec = authorization("{selector: ~, action: ~, rules: ~}").unwrap().spec.unwrap();
    assert_eq!(spec, AuthorizationPolicySpec::default());
    assert_eq!(spec.action, PolicyAction::Allow);
    assert_eq!(authorization("{}").unwrap().namespace(), "default");
    assert_eq!(peer_authentication("{mtls: {mode: ~}}").unwrap().spec.unwrap().mtls, Some(MutualTls::default()));
    let rules = authorization("{rules: [{}, {from: []}, {from: [{source: ~}]}]}").unwrap().spec.unwrap().rules;
    assert_eq!(rules[0], Rule::default());
    assert_eq!(rules[1].from, Some(vec![]));
    assert_eq!(rules[2].from, Some(vec![From::default()]));
}

#[test]
fn a_field_that_is_not_known_is_named() {
    for (spec, path, field) in [
        ("{rule: []}", "spec", "rule"),
        ("{selector: {matchExpressions: []}}", "spec.selector", "matchExpressions"),
        ("{rules: [{form: []}]}", "spec.rules[0]", "form"),
        ("{rules: [{from: [{sources: {}}]}]}", "spec.rules[0].from[0]", "sources"),
        ("{rules: [{}, {from: [{source: {principal: []}}]}]}", "spec.rules[1].from[0].source", "principal"),
        ("{rules: [{to: [{operation: {port: []}}]}]}", "spec.rules[0].to[0].operation", "port"),
        ("{rules: [{when: [{key: a, value: []}]}]}", "spec.rules[0].when[0]", "value"),
    ] {
        refused(authorization(spec), &[path, &format!("unknown field `{field}`")]);
    }
    refused(peer_authentication("{mtls: {modus: STRICT}}"), &["spec.mtls", "unknown field `modus`"]);
}

#[test]
fn an_unknown_mode_is_told_with_its_field_and_the_modes_there_are() {
    for (spec, path, value) in [
        ("{mtls: {mode: strict}}", "spec.mtls.mode", "strict"),
        ("{mtls: {mode: MUTUAL}}", "spec.mtls.mode", "MUTUAL"),
        ("{portLevelMtls: {8080: {mode: OFF}}}", "spec.portLevelMtls.8080.mode", "OFF"),
    ] {
        let expected = format!("{path}: mode `{value}` is not one of UNSET, PERMISSIVE, STRICT, DISABLE");
        refused(peer_authentication(spec), &[&expected]);
    }
    refused(authorization("{action: REFUSE}"), &["spec.action: action `REFUSE` is not one of ALLOW, DENY, AUDIT, CUSTOM"]);
}

#[test]
fn a_port_that_is_none_is_told() {
    for port in ["0", "65536", "-1", "http", "'080'", "''"] {
        let spec = format!("{{portLevelMtls: {{{port}: {{mode: STRICT}}}}}}");
        refused(peer_authentication(&spec), &["spec.portLevelMtls", "a port from 1 to 65535"]);
    }
}

#[test]
fn numbers_among_texts_ask_for_quotes() {
    let expected = ["spec.rules[0].to[0].operation.ports[0]", "8080", "in quotes"];
    refused(authorization("{rules: [{to: [{operation: {ports: [8080]}}]}]}"), &expected);
    refused(authorization("{selector: {matchLabels: {version: 2}}}"), &["spec.selector.matchLabels.version", "in quotes"]);
}

#[test]
fn objects_of_another_kind_or_version_are_refused() {
    let of = |version: &str, kind: &str, name: &str| {
        yaml::<PeerAuthenticationSpec>(&format!("{{apiVersion: {version}, kind: {kind}, metadata: {{name: {name}}}}}"))
    };
    assert!(of("security.istio.io/v1", "PeerAuthentication", "p").is_ok());
    assert!(of("security.istio.io/v1beta1", "PeerAuthentication", "p").is_ok());
    assert!(of("~", "~", "p").is_ok(), "an item of a list");
    refused(of("security.istio.io/v2", "PeerAuthentication", "p"), &["`security.istio.io/v2`", "security.istio.io/v1beta1"]);
    refused(of("security.istio.io/v1", "AuthorizationPolicy", "p"), &["`AuthorizationPolicy` is not `PeerAuthentication`"]);
    refused(of("security.istio.io/v1", "PeerAuthentication", "~"), &["metadata.name is missing"]);
}

#[test]
fn a_list_does_not_stand_for_a_mapping() {
    for spec in ["[STRICT]", "{mtls: [DISABLE]}", "{selector: [{app: web}]}", "{portLevelMtls: {8080: [DISABLE]}}"] {
        refused(peer_authentication(spec), &["spec", "mapping"]);
    }
    for spec in
        ["{rules: [[]]}", "{rules: [{from: [[]]}]}", "{rules: [{from: [{source: [[x]]}]}]}", "{rules: [{when: [[source.ip]]}]}"]
    {
        refused(authorization(spec), &["spec.rules[0]", "mapping"]);
    }
}

#[test]
fn malformed_objects_are_refused_without_a_panic() {
    for spec in ["[]", "7", "{rules: {}}", "{rules: [~]}", "{rules: [{when: [{}]}]}", "{rules: [{from: {}}]}", "{targetRefs: 1}"]
    {
        refused(authorization(spec), &["spec"]);
    }
    refused(yaml::<AuthorizationPolicySpec>("just a text"), &["text"]);
    refused(yaml::<AuthorizationPolicySpec>("{spec: {}}"), &["metadata"]);
}
