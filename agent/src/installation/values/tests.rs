use regex::Regex;
use serde_json::json;

use super::*;

const SCHEMA: &str = include_str!("../../../../deploy/helm/culvert/values.schema.json");

fn set(sets: &[&str]) -> Result<Values, ValuesError> {
    let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
    Values::merge(&[], &sets)
}

/// The chart's schema and the program must be of one opinion.
#[track_caller]
fn check(accepted: bool, sets: &[&str]) {
    let mut values = mapping(DEFAULTS).expect("a mapping");
    for set in sets {
        let (path, text) = set.split_once('=').expect("a pair");
        let value = serde_yaml_ng::from_str(text).expect("YAML");
        let names = split_path(path).expect("a path");
        merge(&mut values, names.into_iter().rev().fold(value, |value, name| json!({name: value})));
    }
    let ours = set(sets);
    assert_eq!(ours.is_ok(), accepted, "{sets:?}: {ours:?}");
    let schema = serde_json::from_str(SCHEMA).expect("JSON");
    assert_eq!(fits(&schema, &values), accepted, "the schema on {sets:?}");
}

/// JSON Schema's words, as far as the chart's schema uses them; another word is a failure of the test.
fn fits(schema: &Value, value: &Value) -> bool {
    let every = |word: (&String, &Value)| {
        let (word, wanted) = word;
        let count = |value: &Value| value.as_array().map_or(0, Vec::len) as u64;
        match word.as_str() {
            "type" => kind(value).contains(&wanted.as_str().expect("a type")),
            "enum" => wanted.as_array().is_some_and(|values| values.contains(value)),
            "pattern" => {
                Regex::new(wanted.as_str().expect("a pattern")).expect("a pattern").is_match(value.as_str().unwrap_or_default())
            }
            "minimum" => value.as_f64() >= wanted.as_f64(),
            "maximum" => value.as_f64() <= wanted.as_f64(),
            "minLength" => value.as_str().map_or(0, str::len) as u64 >= wanted.as_u64().expect("a number"),
            "minItems" => count(value) >= wanted.as_u64().expect("a number"),
            "items" => value.as_array().is_none_or(|items| items.iter().all(|item| fits(wanted, item))),
            "required" => wanted
                .as_array()
                .is_some_and(|names| names.iter().all(|name| value.get(name.as_str().unwrap_or_default()).is_some())),
            "properties" => value.as_object().is_none_or(|fields| {
                fields.iter().all(|(name, field)| wanted.get(name).is_none_or(|schema| fits(schema, field)))
            }),
            "additionalProperties" => value.as_object().is_none_or(|fields| {
                let others = fields.iter().filter(|(name, _)| schema["properties"].get(name.as_str()).is_none());
                let mut fitting = others.map(|(_, field)| wanted.as_bool().unwrap_or_else(|| fits(wanted, field)));
                fitting.all(|fits| fits)
            }),
            "$schema" | "title" | "description" => true,
            other => panic!("the test does not know {other}"),
        }
    };
    schema.as_object().expect("a schema").iter().all(every)
}

fn kind(value: &Value) -> &'static [&'static str] {
    match value {
        Value::Null => &["null"],
        Value::Bool(_) => &["boolean"],
        Value::Number(number) if number.is_f64() => &["number"],
        Value::Number(_) => &["integer", "number"],
        Value::String(_) => &["string"],
        Value::Array(_) => &["array"],
        Value::Object(_) => &["object"],
    }
}

#[test]
fn the_defaults_are_accepted() {
    check(true, &[]);
}

#[test]
fn sensible_values_are_accepted_by_program_and_schema() {
    for sets in [
        ["controller.replicas=3"],
        ["controller.tolerations=[{key: node-role.kubernetes.io/control-plane, operator: Exists}]"],
        ["trustDomain=prod.example.com"],
        ["bindAddress='[::]'"],
        ["certTtl=90m"],
        ["image.tag=0.2.0-rc.1"],
        ["image.repository=registry.example:5000/team/culvert"],
        ["agent.updateStrategy={type: OnDelete}"],
        ["agent.podAnnotations.example\\.com/team=network"],
        ["agent.extraArgs=[--workers=2]"],
        ["agent.resources.limits.memory=1Gi"],
        ["controller.networkPolicy.apiServerPorts=[8443]"],
    ] {
        check(true, &sets);
    }
}

#[test]
fn nonsense_is_refused_by_program_and_schema() {
    for sets in [
        ["controller.replicas=0"],
        ["controller.replicas=two"],
        ["controller.replica=2"],
        ["agent.privileged=true"],
        ["defaultDeny=maybe"],
        ["sameNode=direct"],
        ["certTtl=a day"],
        ["trustDomain=Prod"],
        ["trustDomain=''"],
        ["rootNamespace=Istio_System"],
        ["bindAddress=localhost"],
        ["bindAddress='::'"],
        ["image.pullPolicy=Sometimes"],
        ["image.repository='culvert; rm -rf /'"],
        ["log.format=xml"],
        ["log.filter=''"],
        ["agent.tolerations={operator: Exists}"],
        ["agent.updateStrategy.type=Recreate"],
        ["agent.netnsDir=run/netns"],
        ["agent.bpffsDir=/sys/fs bpf"],
        ["agent.extraArgs=[agent]"],
        ["agent.terminationGracePeriodSeconds=0"],
        ["controller.networkPolicy.apiServerPorts=[]"],
        ["controller.networkPolicy.apiServerPorts=[70000]"],
        ["controller=null"],
        ["excludedNamespaces=[]"],
        ["excludedNamespaces=kube-system"],
    ] {
        check(false, &sets);
    }
}

#[test]
fn an_error_names_the_value_and_what_may_stand_there() {
    let message = |set_: &str| set(&[set_]).expect_err("refused").to_string();
    assert_eq!(message("controller.replicas=0"), "value `controller.replicas`: 0 is not from 1 to 100");
    assert!(
        message("agent.privileged=true").starts_with("value `agent.privileged`: unknown field"),
        "{}",
        message("agent.privileged=true")
    );
    assert!(message("bindAddress=x").contains("`x` is not an IPv4 address"), "{}", message("bindAddress=x"));
    assert!(message("controller.replicas").starts_with("--set controller.replicas: write PATH=VALUE"));
    assert!(message("a..b=1").starts_with("--set a..b=1"));
}

#[test]
fn later_values_win_and_mappings_are_merged() {
    let files = [
        "agent: {netnsDir: /var/run/netns, nodeSelector: {a: b}}".to_owned(),
        "controller: {replicas: 4}\n".to_owned(),
        String::new(),
    ];
    let values = Values::merge(&files, &["controller.replicas=5".to_owned()]).expect("values");
    let values = values.as_value();
    assert_eq!(values["agent"]["netnsDir"], "/var/run/netns");
    assert_eq!(values["agent"]["nodeSelector"], json!({"kubernetes.io/os": "linux", "a": "b"}));
    assert_eq!(values["controller"]["replicas"], 5);
    assert!(matches!(Values::merge(&["- a".to_owned()], &[]), Err(ValuesError::Yaml(_))));
}

#[test]
fn every_value_is_described_in_the_schema_and_none_is_in_it_alone() {
    fn compare(path: &str, schema: &Value, values: &Value) {
        let properties = schema["properties"].as_object();
        let (Some(properties), Some(values)) = (properties, values.as_object()) else { return };
        for (name, schema) in properties.iter().filter(|(name, _)| *name != "global") {
            assert!(schema["description"].is_string(), "{path}.{name} is not described");
            assert!(values.contains_key(name), "{path}.{name} has no default");
            compare(&format!("{path}.{name}"), schema, &values[name]);
        }
    }
    compare("", &serde_json::from_str(SCHEMA).expect("JSON"), &mapping(DEFAULTS).expect("a mapping"));
}

#[test]
fn every_default_has_a_comment_or_its_group_has() {
    let mut explained = false;
    for (number, line) in DEFAULTS.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let indentation = line.len() - line.trim_start().len();
        let is_comment = line.trim_start().starts_with('#');
        let is_group = indentation == 0 && line.ends_with(':');
        assert!(is_comment || is_group || indentation > 0 || explained, "line {}: {line}", number + 1);
        explained = is_comment;
    }
}
