//! The project's own rules: which module may name which, where big dependencies live, and how long a file may be.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use crate::run::root;

/// Which modules of the agent each module may name, beside itself. Pure modules first; composition roots may name all.
const ARROWS: [(&str, &[&str]); 21] = [
    ("backoff", &[]),
    ("model", &[]),
    ("proto", &[]),
    ("policy", &["model"]),
    ("drain", &[]),
    ("limits", &[]),
    ("relay", &["model"]),
    ("capture", &["model"]),
    ("deliver", &["model"]),
    ("identity", &["backoff", "model", "proto"]),
    ("discovery", &["backoff", "identity", "model", "observe", "proto"]),
    ("tunnel", &["model", "identity", "relay"]),
    ("observe", &["model", "policy"]),
    ("serve", &["capture", "drain", "relay"]),
    ("same_node", &["capture", "identity", "model", "observe", "policy"]),
    ("config", &["observe", "tunnel"]),
    ("installation", &["config", "model"]),
    ("diagnosis", &["capture", "config", "installation", "model", "policy"]),
    ("controller", &["backoff", "footprint", "limits", "model", "observe", "policy", "proto"]),
    (
        "outbound",
        &[
            "capture",
            "deliver",
            "discovery",
            "drain",
            "identity",
            "model",
            "observe",
            "open_connections",
            "order",
            "relay",
            "same_node",
            "serve",
            "tunnel",
        ],
    ),
    (
        "inbound",
        &[
            "capture",
            "deliver",
            "drain",
            "identity",
            "limits",
            "model",
            "observe",
            "open_connections",
            "order",
            "policy",
            "relay",
            "same_node",
            "serve",
            "tunnel",
        ],
    ),
];

/// Which modules of the agent, and what is below them, may name a big dependency.
const HOMES: [(&str, &[&str]); 5] = [
    ("aya::", &["capture"]),
    ("culvert_ebpf_common", &["capture"]),
    ("rustls::", &["tunnel", "identity", "discovery", "controller", "inbound"]),
    ("k8s_openapi::", &["controller", "installation", "policy"]),
    (
        "kube::",
        &[
            "controller/kubernetes",
            "controller/node_auth",
            "controller/on_kubernetes",
            "controller/source/kubernetes",
            "installation",
        ],
    ),
];

const LONGEST_FILE: usize = 500;
/// Written in pieces, so that this file passes its own test.
const UNFINISHED: [&str; 4] = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("to", "do!("), concat!("unimpl", "emented!(")];

/// Checks all rules and names every breach.
pub(crate) fn all() -> Result<()> {
    let mut breaches = Vec::new();
    for file in sources(&root())? {
        let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        let name = file.strip_prefix(root()).unwrap_or(&file).to_string_lossy().into_owned();
        check(&name, &text, &mut breaches);
    }
    for breach in &breaches {
        eprintln!("tidy: {breach}");
    }
    ensure!(breaches.is_empty(), "{} breaches of the project's rules", breaches.len());
    Ok(())
}

fn check(name: &str, text: &str, breaches: &mut Vec<String>) {
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or(text);
    let is_test = name.ends_with("/tests.rs") || name.contains("/tests/") || name.starts_with("tests/");
    if code.lines().count() > LONGEST_FILE && !is_test {
        breaches.push(format!("{name} has {} lines without its tests; {LONGEST_FILE} at most", code.lines().count()));
    }
    if name.ends_with("/mod.rs") {
        breaches.push(format!("{name}: name the file after its module"));
    }
    for mark in UNFINISHED.iter().filter(|mark| text.contains(**mark)) {
        breaches.push(format!("{name} says {mark}"));
    }
    let Some(path) = name.strip_prefix("agent/src/") else { return };
    let module = top_module(path);
    if is_test {
        return;
    }
    if let Some((_, allowed)) = ARROWS.iter().find(|(from, _)| *from == module) {
        for named in named_modules(code) {
            if named != module && !allowed.contains(&named.as_str()) {
                breaches.push(format!("{name} names crate::{named}, which {module} must not"));
            }
        }
    }
    for (dependency, homes) in HOMES {
        let at_home = homes.iter().any(|home| is_below(path, home));
        if code.contains(dependency) && !at_home {
            breaches.push(format!("{name} names {dependency}; its home is {}", homes.join(", ")));
        }
    }
}

/// The module of a path below `agent/src`.
fn top_module(path: &str) -> &str {
    path.split(['/', '.']).next().unwrap_or(path)
}

/// Whether a path below `agent/src` is of a module or of one inside it.
fn is_below(path: &str, module: &str) -> bool {
    path.strip_prefix(module).is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
}

/// What follows `crate::` in the code, comments left out. A list in braces gives each of its names.
fn named_modules(code: &str) -> BTreeSet<String> {
    let code: String = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut named = BTreeSet::new();
    for rest in code.split("crate::").skip(1) {
        match rest.strip_prefix('{') {
            None => drop(named.insert(word(rest))),
            Some(list) => {
                let list = list.split('}').next().unwrap_or(list);
                named.extend(list.split(',').map(|item| word(item.trim())).filter(|name| !name.is_empty()));
            }
        }
    }
    named
}

fn sources(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))? {
        let path = entry?.path();
        let hidden = path.file_name().is_some_and(|name| name == "target" || name.to_string_lossy().starts_with('.'));
        if path.is_dir() && !hidden {
            found.extend(sources(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn breaches(name: &str, text: &str) -> Vec<String> {
        let mut found = Vec::new();
        check(name, text, &mut found);
        found
    }

    #[test]
    fn an_arrow_that_is_not_allowed_is_named() {
        assert_eq!(breaches("agent/src/relay/tcp.rs", "use crate::capture::Maps;").len(), 1);
        assert_eq!(breaches("agent/src/policy.rs", "use crate::{model::Flow, drain};").len(), 1);
        assert!(breaches("agent/src/policy.rs", "use crate::model::Flow; // crate::drain\n").len() <= 1);
    }

    #[test]
    fn a_dependency_away_from_home_is_named() {
        assert_eq!(breaches("agent/src/model.rs", "use aya::Ebpf;").len(), 1);
        assert!(breaches("agent/src/capture/load.rs", "use aya::Ebpf;").is_empty());
        assert_eq!(breaches("agent/src/controller/index.rs", "use kube::Client;").len(), 1);
        assert!(breaches("agent/src/controller/source/kubernetes.rs", "use kube::Client;").is_empty());
    }

    #[test]
    fn a_file_that_is_too_long_is_named_and_its_tests_do_not_count() {
        let long = "x\n".repeat(LONGEST_FILE + 1);
        assert_eq!(breaches("agent/src/model.rs", &long).len(), 1);
        let tested = format!("x\n#[cfg(test)]\nmod tests {{\n{long}");
        assert!(breaches("agent/src/model.rs", &tested).is_empty());
    }
}
