use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use super::Manifests;
use super::parse::parse;
use crate::controller::source::{About, Change, Feed, Source};
use crate::policy::compile::MeshContext;

/// A followed directory, and the names of the objects in force with a label of theirs.
struct Followed {
    directory: TempDir,
    feed: Feed,
    objects: std::collections::BTreeMap<String, String>,
    batches: usize,
}

fn context() -> MeshContext {
    MeshContext { root_namespace: "istio-system".to_owned(), trust_domain: "cluster.local".parse().unwrap() }
}

fn account(name: &str, version: &str) -> String {
    format!("apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {name}, labels: {{v: '{version}'}}}}\n")
}

impl Followed {
    async fn new(prepare: impl FnOnce(&Path)) -> Self {
        let directory = TempDir::new().unwrap();
        prepare(directory.path());
        let feed = Manifests::new(directory.path().to_owned(), context()).start(CancellationToken::new()).unwrap();
        let mut followed = Self { directory, feed, objects: Default::default(), batches: 0 };
        followed.read().await;
        followed
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, content: &str) {
        fs::write(self.path(name), content).unwrap();
    }

    /// Applies the next batch.
    async fn read(&mut self) {
        let batch =
            tokio::time::timeout(Duration::from_secs(20), self.feed.batches.recv()).await.expect("a batch in time").unwrap();
        self.batches += 1;
        for change in &batch.changes {
            match change {
                Change::Applied { object, .. } => {
                    let version = object.metadata().labels.as_ref().and_then(|labels| labels.get("v")).cloned();
                    self.objects.insert(object.key().name, version.unwrap_or_default());
                }
                Change::Removed(key) => drop(self.objects.remove(&key.name)),
                Change::Refused { key, .. } => panic!("{key} is handed on although it cannot be used"),
            }
        }
        batch.passed();
    }

    /// What is in force once everything written so far has been read: `name=version` of each object.
    async fn settled(&mut self) -> Vec<String> {
        let barrier = self.feed.barrier.clone();
        let mut passed = std::pin::pin!(async move { barrier.pass(About::Other).await });
        loop {
            tokio::select! {
                reached = &mut passed => {
                    assert!(reached);
                    return self.objects.iter().map(|(name, version)| format!("{name}={version}")).collect();
                }
                () = self.read() => {}
            }
        }
    }
}

#[tokio::test]
async fn all_files_and_documents_below_the_directory_are_read() {
    let list = format!(
        "{{\"apiVersion\": \"v1\", \"kind\": \"List\", \"items\": [{}]}}",
        r#"{"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "d"}}"#
    );
    let mut followed = Followed::new(|directory| {
        fs::create_dir_all(directory.join("deep/er")).unwrap();
        fs::write(directory.join("a.yaml"), format!("{}---\n---\n# nothing\n---\n{}", account("a", "1"), account("b", "1")))
            .unwrap();
        fs::write(directory.join("deep/er/c.yml"), account("c", "1")).unwrap();
        fs::write(directory.join("deep/d.json"), list).unwrap();
        fs::write(directory.join("e.txt"), account("e", "1")).unwrap();
        fs::write(directory.join(".f.yaml"), account("f", "1")).unwrap();
        fs::write(directory.join("g.yaml"), "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: g}\n").unwrap();
    })
    .await;
    assert_eq!(followed.settled().await, ["a=1", "b=1", "c=1", "d="]);
}

#[tokio::test]
async fn changes_renames_and_removals_are_followed() {
    let mut followed = Followed::new(|_| {}).await;
    followed.write("a.yaml", &account("a", "1"));
    assert_eq!(followed.settled().await, ["a=1"]);
    followed.write("a.yaml", &account("a", "2"));
    assert_eq!(followed.settled().await, ["a=2"]);
    followed.write("draft", &account("a", "3"));
    fs::rename(followed.path("draft"), followed.path("a.yaml")).unwrap();
    assert_eq!(followed.settled().await, ["a=3"]);
    fs::rename(followed.path("a.yaml"), followed.path("b.yaml")).unwrap();
    assert_eq!(followed.settled().await, ["a=3"]);
    fs::rename(followed.path("b.yaml"), followed.path("b.off")).unwrap();
    assert_eq!(followed.settled().await, [""; 0]);
    fs::rename(followed.path("b.off"), followed.path("b.yaml")).unwrap();
    assert_eq!(followed.settled().await, ["a=3"]);
    fs::remove_file(followed.path("b.yaml")).unwrap();
    assert_eq!(followed.settled().await, [""; 0]);
}

#[tokio::test]
async fn changes_are_told_without_being_asked_for() {
    let mut followed = Followed::new(|_| {}).await;
    followed.write("a.yaml", &account("a", "1"));
    while followed.objects.is_empty() {
        followed.read().await;
    }
    fs::create_dir_all(followed.path("new/er")).unwrap();
    followed.write("new/er/b.yaml", &account("b", "1"));
    while followed.objects.len() < 2 {
        followed.read().await;
    }
    followed.write("new/er/b.yaml", &account("b", "2"));
    while followed.objects["b"] != "2" {
        followed.read().await;
    }
}

#[tokio::test]
async fn directories_come_and_go_with_all_that_is_in_them() {
    let mut followed = Followed::new(|_| {}).await;
    for round in 0..20 {
        fs::create_dir_all(followed.path("x/y")).unwrap();
        followed.write("x/y/a.yaml", &account("a", &round.to_string()));
        assert_eq!(followed.settled().await, [format!("a={round}")]);
        fs::rename(followed.path("x"), followed.path("z")).unwrap();
        assert_eq!(followed.settled().await, [format!("a={round}")]);
        followed.write("z/y/a.yaml", &account("a", "moved"));
        assert_eq!(followed.settled().await, ["a=moved"]);
        fs::remove_dir_all(followed.path("z")).unwrap();
        assert_eq!(followed.settled().await, [""; 0]);
    }
}

#[tokio::test]
async fn a_bad_file_keeps_what_it_said_before() {
    let mut followed = Followed::new(|_| {}).await;
    let good = format!("{}---\n{}", account("a", "1"), account("b", "1"));
    followed.write("a.yaml", &good);
    assert_eq!(followed.settled().await, ["a=1", "b=1"]);
    for bad in ["a: [", "\u{0}", "kind: Pod\nkind: Pod\n", "- just\n- a list\n", "!!tagged {}\n"] {
        followed.write("a.yaml", bad);
        assert_eq!(followed.settled().await, ["a=1", "b=1"], "{bad:?}");
    }
    fs::write(followed.path("a.yaml"), b"\xff\xfe").unwrap();
    assert_eq!(followed.settled().await, ["a=1", "b=1"]);
    followed.write("a.yaml", &account("b", "2"));
    assert_eq!(followed.settled().await, ["b=2"]);
}

#[tokio::test]
async fn a_bad_document_does_not_hold_up_the_good_ones() {
    let mut followed = Followed::new(|_| {}).await;
    followed.write("a.yaml", &format!("{}---\n{}", account("a", "1"), account("b", "1")));
    assert_eq!(followed.settled().await, ["a=1", "b=1"]);
    let bad = "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: b, labels: {v: 2}}\n";
    followed.write("a.yaml", &format!("{}---\n{bad}", account("a", "two")));
    assert_eq!(followed.settled().await, ["a=two", "b=1"]);
    fs::remove_file(followed.path("a.yaml")).unwrap();
    assert_eq!(followed.settled().await, [""; 0]);
}

#[tokio::test]
async fn a_file_being_written_is_left_alone_until_it_is_closed() {
    let mut followed = Followed::new(|_| {}).await;
    followed.write("a.yaml", &format!("{}---\n{}", account("a", "1"), account("b", "1")));
    assert_eq!(followed.settled().await, ["a=1", "b=1"]);
    let mut file = fs::File::create(followed.path("a.yaml")).unwrap();
    assert_eq!(followed.settled().await, ["a=1", "b=1"], "an emptied file is not read");
    file.write_all(account("a", "2").as_bytes()).unwrap();
    assert_eq!(followed.settled().await, ["a=1", "b=1"], "nor is half a file");
    file.write_all(format!("---\n{}", account("b", "2")).as_bytes()).unwrap();
    drop(file);
    assert_eq!(followed.settled().await, ["a=2", "b=2"]);
}

#[tokio::test]
async fn a_half_written_file_that_was_closed_ends_well() {
    let mut followed = Followed::new(|_| {}).await;
    followed.write("a.yaml", "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: a, lab");
    assert_eq!(followed.settled().await, [""; 0]);
    followed.write("a.yaml", &account("a", "1"));
    assert_eq!(followed.settled().await, ["a=1"]);
}

#[tokio::test]
async fn of_two_files_with_one_object_the_first_by_name_wins() {
    let mut followed = Followed::new(|_| {}).await;
    followed.write("b.yaml", &account("a", "from-b"));
    assert_eq!(followed.settled().await, ["a=from-b"]);
    followed.write("a.yaml", &account("a", "from-a"));
    assert_eq!(followed.settled().await, ["a=from-a"]);
    followed.write("b.yaml", &account("a", "again"));
    assert_eq!(followed.settled().await, ["a=from-a"]);
    fs::remove_file(followed.path("a.yaml")).unwrap();
    assert_eq!(followed.settled().await, ["a=again"]);
}

#[tokio::test]
async fn a_mounted_config_map_is_followed_through_its_links() {
    let mut followed = Followed::new(|directory| {
        for version in ["1", "2"] {
            fs::create_dir(directory.join(format!("..{version}"))).unwrap();
            fs::write(directory.join(format!("..{version}/a.yaml")), account("a", version)).unwrap();
        }
        symlink("..1", directory.join("..data")).unwrap();
        symlink("..data/a.yaml", directory.join("a.yaml")).unwrap();
    })
    .await;
    assert_eq!(followed.settled().await, ["a=1"]);
    symlink("..2", followed.path("..data_tmp")).unwrap();
    fs::rename(followed.path("..data_tmp"), followed.path("..data")).unwrap();
    assert_eq!(followed.settled().await, ["a=2"]);
}

#[tokio::test]
async fn linked_directories_are_followed_and_loops_end() {
    let outside = TempDir::new().unwrap();
    let target = outside.path().to_owned();
    let mut followed = Followed::new(|directory| symlink(directory, directory.join("loop")).unwrap()).await;
    symlink(&target, followed.path("linked")).unwrap();
    assert_eq!(followed.settled().await, [""; 0]);
    fs::write(target.join("a.yaml"), account("a", "1")).unwrap();
    assert_eq!(followed.settled().await, ["a=1"]);
    fs::remove_file(followed.path("linked")).unwrap();
    assert_eq!(followed.settled().await, [""; 0]);
}

#[tokio::test]
async fn a_thicket_of_links_is_walked_once() {
    // Every directory links to every other: without counting the ways there are more than a million of them.
    let names: Vec<_> = (0..12).map(|number| format!("d{number:02}")).collect();
    let mut followed = Followed::new(|directory| {
        for name in &names {
            fs::create_dir(directory.join(name)).unwrap();
            fs::write(directory.join(name).join("object.yaml"), account(name, "1")).unwrap();
        }
        for (from, to) in names.iter().flat_map(|from| names.iter().map(move |to| (from, to))) {
            symlink(directory.join(to), directory.join(from).join(format!("to-{to}"))).unwrap();
        }
    })
    .await;
    let all: Vec<_> = names.iter().map(|name| format!("{name}=1")).collect();
    assert_eq!(followed.settled().await, all);
    followed.write("d07/object.yaml", &account("d07", "2"));
    assert!(followed.settled().await.contains(&"d07=2".to_owned()));
}

#[tokio::test]
async fn a_directory_that_is_taken_away_keeps_what_it_held_until_it_is_back() {
    let outer = TempDir::new().unwrap();
    let path = outer.path().join("manifests");
    let feed = Manifests::new(path.clone(), context()).start(CancellationToken::new()).unwrap();
    let mut followed = Followed { directory: outer, feed, objects: Default::default(), batches: 0 };
    followed.read().await;
    fs::create_dir(&path).unwrap();
    followed.write("manifests/a.yaml", &account("a", "1"));
    assert_eq!(followed.settled().await, ["a=1"]);
    fs::rename(&path, followed.path("away")).unwrap();
    assert_eq!(followed.settled().await, ["a=1"]);
    fs::create_dir(&path).unwrap();
    followed.write("manifests/b.yaml", &account("b", "1"));
    assert_eq!(followed.settled().await, ["b=1"]);
}

#[tokio::test]
async fn a_named_pipe_or_a_directory_named_like_a_manifest_is_no_obstacle() {
    let mut followed = Followed::new(|directory| {
        nix::unistd::mkfifo(&directory.join("pipe.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::create_dir(directory.join("dir.yaml")).unwrap();
        fs::write(directory.join("dir.yaml/a.yaml"), account("a", "1")).unwrap();
    })
    .await;
    assert_eq!(followed.settled().await, ["a=1"]);
}

#[tokio::test]
async fn ten_thousand_files_are_read_in_one_batch_and_one_of_them_is_followed() {
    let mut followed = Followed::new(|directory| {
        for number in 0..10_000 {
            fs::write(directory.join(format!("{number}.yaml")), account(&format!("n{number}"), "1")).unwrap();
        }
    })
    .await;
    assert_eq!((followed.objects.len(), followed.batches), (10_000, 1));
    followed.write("77.yaml", &account("n77", "2"));
    followed.settled().await;
    assert_eq!((followed.objects["n77"].as_str(), followed.objects.len()), ("2", 10_000));
}

/// The message on the only bad document of a text.
fn problem(text: &str) -> String {
    let items = parse(Path::new("x.yaml"), text.as_bytes(), &context()).unwrap();
    let mut problems = items.into_iter().filter_map(|item| item.object.err().map(|error| format!("{}: {error}", item.place)));
    let problem = problems.next().expect("a problem");
    assert_eq!(problems.next(), None);
    problem
}

#[test]
fn messages_name_the_document_the_object_the_field_the_value_and_the_way_out() {
    let check = |text: &str, parts: &[&str]| {
        let message = problem(text);
        for part in parts {
            assert!(message.contains(part), "`{part}` is not in: {message}");
        }
    };
    let policy = |kind: &str, spec: &str| {
        format!("apiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{name: p, namespace: shop}}\nspec: {spec}\n")
    };
    check(
        &format!("{}---\n{}", account("a", "1"), policy("PeerAuthentication", "{mtls: {mode: STRICTER}}")),
        &["document 2", "PeerAuthentication shop/p", "spec.mtls.mode", "STRICTER", "PERMISSIVE"],
    );
    check(&policy("AuthorizationPolicy", "{acton: DENY}"), &["AuthorizationPolicy shop/p", "acton", "action"]);
    check(
        &policy("AuthorizationPolicy", "{rules: [{from: [{source: {ipBlocks: [10.0.0.0/99]}}]}]}"),
        &["10.0.0.0/99", "spec.rules[0].from[0].source.ipBlocks"],
    );
    check(&policy("AuthorizationPolicy", "{}\nspecs: {}"), &["specs", "is not a field"]);
    check("apiVersion: v1\nkind: Pod\nmetadata: {}\n", &["Pod without a name", "metadata.name", "missing"]);
    check("apiVersion: v1\nkind: Node\nmetadata: {name: ../../etc/passwd}\n", &["Node ../../etc/passwd", "metadata.name", "a-z"]);
    check(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nstatus: {podIPs: [{ip: 10.0.0.999}]}\n",
        &["Pod p", "status.podIPs[0].ip", "10.0.0.999"],
    );
    check(
        "apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {ports: [{port: 0}]}\n",
        &["spec.ports[0].port", "0 is not a port"],
    );
    check("apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {ports: http}\n", &["Service s", "spec.ports", "http"]);
    check("kind: Pod\nmetadata: {name: p}\n", &["apiVersion", "missing"]);
    check("apiVersion: v1\n", &["kind", "missing"]);
    check(
        "apiVersion: security.istio.io/v1alpha1\nkind: PeerAuthentication\nmetadata: {name: p}\n",
        &["v1alpha1", "security.istio.io/v1 or"],
    );
    check("apiVersion: v1\nkind: List\nitems: [7]\n", &["document 1, item 1", "a number"]);
}
