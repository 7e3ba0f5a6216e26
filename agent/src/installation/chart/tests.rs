use std::collections::BTreeSet;
use std::path::Path;

use super::*;

const MODERN: [&str; 3] = ["v1", "policy/v1", "admissionregistration.k8s.io/v1/ValidatingAdmissionPolicy"];
const OLD: [&str; 2] = ["v1", "policy/v1beta1"];

fn rendered(sets: &[&str], api_versions: &[&str]) -> Vec<Rendered> {
    let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
    let values = Values::merge(&[], &sets).expect("values");
    let target = Target { namespace: NAMESPACE.to_owned(), api_versions: api_versions.iter().map(ToString::to_string).collect() };
    render(&values, &target).expect("rendered")
}

fn object(rendered: &[Rendered], kind: &str, name: &str) -> Value {
    let mut objects = rendered.iter().flat_map(|file| &file.objects);
    let found = objects.find(|object| object["kind"] == kind && object["metadata"]["name"] == name);
    found.unwrap_or_else(|| panic!("no {kind} {name}")).clone()
}

fn agent(sets: &[&str]) -> Value {
    object(&rendered(sets, &MODERN), "DaemonSet", "culvert-agent")
}

fn container(workload: &Value) -> Value {
    workload["spec"]["template"]["spec"]["containers"][0].clone()
}

fn texts(list: &Value) -> Vec<&str> {
    list.as_array().expect("a list").iter().map(|text| text.as_str().expect("a text")).collect()
}

#[test]
fn every_template_and_definition_of_the_directory_is_in_the_binary() {
    let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/helm/culvert");
    let listed: BTreeSet<_> = TEMPLATES.iter().chain(DEFINITIONS).map(|(name, _)| (*name).to_owned()).collect();
    let of = |directory: &str| {
        let entries = std::fs::read_dir(chart.join(directory)).expect("a directory");
        let names: Vec<_> = entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8")).collect();
        names
            .into_iter()
            .filter(|name| name.ends_with(".yaml"))
            .map(move |name| format!("{directory}/{name}"))
            .collect::<Vec<_>>()
    };
    let found: BTreeSet<_> = of("templates").into_iter().chain(of("crds")).collect();
    assert_eq!(listed, found);
}

#[test]
fn the_release_of_the_chart_is_that_of_the_program() {
    let chart: Value = serde_yaml_ng::from_str(include_str!("../../../../deploy/helm/culvert/Chart.yaml")).expect("YAML");
    assert_eq!(chart["appVersion"], env!("CARGO_PKG_VERSION"));
    assert_eq!(chart["version"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn no_container_is_privileged_and_all_capabilities_but_the_named_are_dropped() {
    for workload in [agent(&[]), object(&rendered(&[], &MODERN), "Deployment", "culvert-controller")] {
        let container = container(&workload);
        let context = &container["securityContext"];
        assert_ne!(context["privileged"], true);
        assert_eq!(context["allowPrivilegeEscalation"], false);
        assert_eq!(context["readOnlyRootFilesystem"], true);
        assert_eq!(context["capabilities"]["drop"], json!(["ALL"]));
    }
    assert_eq!(
        texts(&container(&agent(&[]))["securityContext"]["capabilities"]["add"]),
        ["SYS_ADMIN", "NET_ADMIN", "SYS_PTRACE"]
    );
    let mounting = agent(&["agent.mountBpffs=true"]);
    assert!(texts(&container(&mounting)["securityContext"]["capabilities"]["add"]).contains(&"SYS_CHROOT"));
}

#[test]
fn every_capability_and_mount_says_which_code_needs_it() {
    let rendered = rendered(&["agent.mountBpffs=true"], &MODERN);
    let file = rendered.iter().find(|file| file.name == "templates/agent.yaml").expect("the agent");
    let lines: Vec<&str> = file.text.lines().map(str::trim).collect();
    let section = |from: &str, to: &str| {
        let begin = lines.iter().position(|line| *line == from).expect("a beginning") + 1;
        let length = lines[begin..].iter().position(|line| line.starts_with(to)).expect("an end");
        lines[begin..begin + length].to_vec()
    };
    for (lines, count) in [(section("add:", "volumeMounts:"), 4), (section("volumeMounts:", "volumes:"), 6)] {
        let items: Vec<usize> = (0..lines.len()).filter(|at| lines[*at].starts_with("- ")).collect();
        assert_eq!(items.len(), count, "{lines:?}");
        for at in items {
            assert!(at > 0 && lines[at - 1].starts_with('#'), "{} has no reason", lines[at]);
        }
    }
}

#[test]
fn every_volume_is_mounted_and_the_host_ones_are_as_narrow_as_can_be() {
    let agent = agent(&[]);
    let volumes = agent["spec"]["template"]["spec"]["volumes"].as_array().expect("volumes").clone();
    let mounts = container(&agent)["volumeMounts"].as_array().expect("mounts").clone();
    let names = |list: &[Value]| list.iter().map(|item| item["name"].to_string()).collect::<BTreeSet<_>>();
    assert_eq!(names(&volumes), names(&mounts));
    let paths: BTreeSet<_> = volumes.iter().filter_map(|volume| volume["hostPath"]["path"].as_str()).collect();
    assert_eq!(paths, BTreeSet::from(["/run/netns", "/sys/fs/bpf", "/sys/fs/cgroup", "/var/lib/culvert"]));
    let netns = mounts.iter().find(|mount| mount["name"] == "netns").expect("a mount");
    assert_eq!(netns["mountPropagation"], "HostToContainer");
}

/// YAML 1.1 has octal numbers that YAML 1.2 takes for text: Helm reads the one, this program the other.
#[test]
fn file_modes_are_numbers_for_every_reader() {
    for file in rendered(&[], &MODERN) {
        for mode in file.text.lines().filter_map(|line| line.trim().strip_prefix("defaultMode: ")) {
            assert!(!mode.starts_with('0') && mode.parse::<u32>().is_ok(), "{}: {mode}", file.name);
        }
    }
    let agent = agent(&[]);
    let volumes = agent["spec"]["template"]["spec"]["volumes"].as_array().expect("volumes");
    assert!(volumes.iter().any(|volume| volume["projected"]["defaultMode"] == 0o400));
}

#[test]
fn the_arguments_are_those_that_the_roles_take() {
    let agent = agent(&["agent.extraArgs=[--workers=2]"]);
    let arguments = container(&agent)["args"].clone();
    let arguments = texts(&arguments);
    assert!(arguments.contains(&"--controller=https://culvert-controller.culvert-system.svc:15012"));
    assert!(arguments.contains(&"--workers=2"));
    let controller = object(&rendered(&["defaultDeny=true", "sameNode=tunnel"], &MODERN), "Deployment", "culvert-controller");
    let arguments = container(&controller)["args"].clone();
    assert!(texts(&arguments).contains(&"--default-deny"));
    assert!(texts(&arguments).contains(&"--same-node=tunnel"));
}

#[test]
fn the_controller_runs_as_nobody_on_two_nodes_and_drains_keep_one() {
    let rendered = rendered(&[], &MODERN);
    let spec = object(&rendered, "Deployment", "culvert-controller")["spec"].clone();
    assert_eq!(spec["replicas"], 2);
    let pod = &spec["template"]["spec"];
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
    assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
    assert!(pod["affinity"]["podAntiAffinity"].is_object());
    assert_eq!(object(&rendered, "PodDisruptionBudget", "culvert-controller")["spec"]["maxUnavailable"], 1);
    object(&rendered, "NetworkPolicy", "culvert-controller");
}

#[test]
fn what_the_api_offers_decides_on_versions() {
    let budget =
        |versions: &[&str]| object(&rendered(&[], versions), "PodDisruptionBudget", "culvert-controller")["apiVersion"].clone();
    assert_eq!(budget(&MODERN), "policy/v1");
    assert_eq!(budget(&OLD), "policy/v1beta1");
    let confined = |versions: &[&str]| {
        let agent = object(&rendered(&[], versions), "DaemonSet", "culvert-agent");
        let annotations = agent["spec"]["template"]["metadata"]["annotations"].clone();
        let annotated = annotations.get("container.apparmor.security.beta.kubernetes.io/agent").is_some();
        (annotated, container(&agent)["securityContext"].get("appArmorProfile").is_some())
    };
    assert_eq!(confined(&MODERN), (false, true));
    assert_eq!(confined(&OLD), (true, false));
}

#[test]
fn options_leave_out_what_they_are_for() {
    let kinds = |sets: &[&str]| {
        let rendered = rendered(sets, &MODERN);
        rendered.iter().flat_map(|file| &file.objects).map(|object| object["kind"].to_string()).collect::<BTreeSet<_>>()
    };
    let default = kinds(&[]);
    assert!(!default.contains("\"Namespace\"") && !default.contains("\"ResourceQuota\""));
    assert!(
        kinds(&["namespace.create=true", "priorityQuota=true"])
            .is_superset(&BTreeSet::from(["\"Namespace\"".into(), "\"ResourceQuota\"".into()]))
    );
    let fewer = kinds(&["controller.networkPolicy.enabled=false", "controller.podDisruptionBudget.enabled=false"]);
    assert!(!fewer.contains("\"NetworkPolicy\"") && !fewer.contains("\"PodDisruptionBudget\""));
}

#[test]
fn every_object_is_labelled_and_in_the_namespace() {
    let cluster_wide = ["Namespace", "ClusterRole", "ClusterRoleBinding"];
    for file in rendered(&["namespace.create=true", "priorityQuota=true"], &MODERN) {
        for object in &file.objects {
            let metadata = &object["metadata"];
            assert_eq!(metadata["labels"]["app.kubernetes.io/part-of"], "culvert", "{object}");
            let inside = !cluster_wide.contains(&object["kind"].as_str().expect("a kind"));
            assert_eq!(metadata.get("namespace").is_some(), inside, "{object}");
        }
    }
}

#[test]
fn no_role_may_read_secrets_but_the_authoritys_or_write_but_what_is_named() {
    let rendered = rendered(&[], &MODERN);
    let mut rules = Vec::new();
    for object in rendered.iter().flat_map(|file| &file.objects) {
        if object["kind"].as_str().is_some_and(|kind| kind.ends_with("Role")) {
            rules.extend(object["rules"].as_array().expect("rules").iter().map(|rule| (object["kind"].clone(), rule.clone())));
        }
    }
    assert!(rules.len() > 8);
    for (kind, rule) in rules {
        let (resources, verbs) = (texts(&rule["resources"]), texts(&rule["verbs"]));
        assert!(!verbs.contains(&"*") && !resources.contains(&"*"), "{rule}");
        if resources.contains(&"secrets") {
            assert_eq!(kind, "Role", "{rule}");
            assert!(verbs == ["create"] || rule.get("resourceNames").is_some(), "{rule}");
        }
        assert!(!verbs.contains(&"delete") && !verbs.contains(&"deletecollection"), "{rule}");
        let writes = verbs.iter().any(|verb| ["update", "patch"].contains(verb));
        let of_its_own = resources.iter().all(|resource| resource.ends_with("/status") || *resource == "events");
        assert!(!writes || of_its_own || rule.get("resourceNames").is_some(), "{rule}");
    }
}

#[test]
fn definitions_offer_both_versions_with_one_schema() {
    for definition in definitions().expect("definitions").iter().flat_map(|file| &file.objects) {
        let versions = definition["spec"]["versions"].as_array().expect("versions");
        let names: Vec<_> = versions.iter().map(|version| version["name"].as_str().expect("a name")).collect();
        assert_eq!(names, ["v1", "v1beta1"]);
        assert_eq!(versions[0]["schema"], versions[1]["schema"]);
        assert!(versions.iter().all(|version| version["served"] == true && version["subresources"]["status"].is_object()));
    }
}

#[test]
fn the_manifest_has_all_objects_and_their_comments() {
    let rendered = rendered(&["namespace.create=true"], &MODERN);
    let text = manifest(&rendered);
    let documents: Vec<Value> =
        serde_yaml_ng::Deserializer::from_str(&text).map(|document| Value::deserialize(document).expect("YAML")).collect();
    let objects: Vec<Value> = rendered.iter().flat_map(|file| file.objects.clone()).collect();
    assert_eq!(documents, objects);
    assert!(text.contains("# setns(2) into pods' network namespaces"));
}
