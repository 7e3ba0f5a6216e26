//! What one agent keeps and the next one finds, and what is done with files that nobody can rely on.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

use tempfile::TempDir;

use super::super::fixture::{mesh_resource, pod, pod_resource, policy_resource, response, uid};
use super::super::mirror::Kind;
use super::*;
use crate::identity::test_authority::TestAuthority;
use crate::proto::discovery::Resource;
use crate::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE, MESH_TYPE, security};

#[test]
fn what_one_agent_keeps_the_next_one_holds() {
    let state = State::new();
    state.keep_mesh();
    let (mirror, _keeper) = state.recall();
    assert_eq!(mirror.versions(Kind::Address), versions(&[("a", "1"), ("b", "1")]));
    assert_eq!(mirror.versions(Kind::Authorization).len(), 1);
    assert_eq!(mirror.versions(Kind::Mesh).len(), 1);
}

#[test]
fn without_a_predecessor_there_is_nothing() {
    let state = State::new();
    let (mirror, keeper) = state.recall();
    assert_eq!((mirror.size(), keeper.is_some(), state.aside().exists()), (0, true, false));
}

#[test]
fn what_was_replaced_or_removed_is_not_there_again() {
    let state = State::new();
    state.keep_mesh();
    state.keep(response(ADDRESS_TYPE, vec![version("2", pod_resource(pod("a", [10, 0, 0, 9])))], &[&uid("b")]));
    state.keep(response(AUTHORIZATION_TYPE, Vec::new(), &["shop/deny"]));
    let (mirror, _keeper) = state.recall();
    assert_eq!(mirror.versions(Kind::Address), versions(&[("a", "2")]));
    assert!(mirror.versions(Kind::Authorization).is_empty());
}

#[test]
fn what_has_no_version_is_not_kept() {
    let state = State::new();
    state.keep(response(ADDRESS_TYPE, vec![version("", pod_resource(pod("a", [10, 0, 0, 1])))], &[]));
    assert_eq!(state.recall().0.size(), 0);
}

#[test]
fn the_file_is_for_its_owner_alone() {
    let state = State::new();
    state.keep_mesh();
    let mode = |path: &Path| fs::metadata(path).expect("there").mode() & 0o777;
    assert_eq!((mode(&state.path()), mode(&state.place.directory)), (0o600, 0o700));
}

#[test]
fn a_file_that_others_may_write_is_put_aside() {
    for (mode, used) in [(0o600, true), (0o644, true), (0o620, false), (0o602, false), (0o666, false)] {
        let state = State::new();
        state.keep_mesh();
        fs::set_permissions(state.path(), fs::Permissions::from_mode(mode)).expect("the owner's");
        state.assert_used(used, &format!("mode {mode:04o}"));
    }
}

#[test]
fn a_file_of_another_user_is_put_aside() {
    if !nix::unistd::geteuid().is_root() {
        println!("not run: only root can give a file away");
        return;
    }
    for (owner, used) in [(0, true), (1, false)] {
        let state = State::new();
        state.keep_mesh();
        std::os::unix::fs::chown(state.path(), Some(owner), None).expect("root may");
        state.assert_used(used, &format!("user {owner}"));
    }
}

#[test]
fn in_a_directory_that_others_may_write_nothing_is_read_or_kept() {
    for (mode, used) in [(0o755, true), (0o775, false), (0o1777, false)] {
        let state = State::new();
        state.keep_mesh();
        fs::set_permissions(&state.place.directory, fs::Permissions::from_mode(mode)).expect("the owner's");
        let (mirror, keeper) = state.recall();
        assert_eq!((mirror.size() > 0, keeper.is_some()), (used, used), "mode {mode:04o}");
    }
}

#[test]
fn what_is_no_regular_file_is_put_aside() {
    let state = State::new();
    state.keep_mesh();
    let elsewhere = state.place.directory.join("elsewhere");
    fs::rename(state.path(), &elsewhere).expect("moved");
    symlink(&elsewhere, state.path()).expect("a link");
    state.assert_used(false, "a link");
    assert!(elsewhere.is_file(), "what it led to is as it was");
    fs::remove_file(state.path()).expect("there");
    nix::unistd::mkfifo(&state.path(), nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
    state.assert_used(false, "a pipe");
}

#[test]
fn a_file_is_used_for_its_node_its_controller_and_its_root_only() {
    let other_root = TestAuthority::new("other").root_pem();
    let check = |about: &str, used: bool, change: &dyn Fn(&mut State)| {
        let mut state = State::new();
        state.keep_mesh();
        let (path, former) = (state.path(), state.place.clone());
        change(&mut state);
        // A foreign file is one that lies where the own one should.
        if state.path() != path {
            fs::rename(path, state.path()).expect("moved");
        }
        state.assert_used(used, about);
        drop(former);
    };
    check("the same", true, &|_| {});
    check("another node", false, &|state| state.place.node = "other".into());
    check("another controller", false, &|state| state.place.endpoint = state.endpoint("https://other:15012"));
    check("another root", false, &|state| fs::write(&state.root, &other_root).expect("written"));
    check("a root beside the former", true, &|state| {
        let both = fs::read_to_string(&state.root).expect("there") + &other_root;
        fs::write(&state.root, both).expect("written");
    });
}

#[test]
fn a_file_outlives_the_rotation_of_the_root() {
    let state = State::new();
    state.keep_mesh();
    let next = TestAuthority::new("next").root_pem();
    let both = fs::read_to_string(&state.root).expect("there") + &next;
    let (_mirror, keeper) = state.recall();
    let keeper = keeper.expect("kept");
    fs::write(&state.root, both).expect("written");
    keeper.connected();
    keeper.finish();
    fs::write(&state.root, next).expect("written");
    state.assert_used(true, "the former root is gone");
}

#[test]
fn a_damaged_file_is_put_aside_wherever_it_is_damaged() {
    let whole = State::new();
    whole.keep_mesh();
    let bytes = fs::read(whole.path()).expect("there");
    // The lengths of blocks are told apart below: one that is too long by chance is an end that was cut off.
    for place in (0..bytes.len()).step_by(7).filter(|place| !lengths(&bytes).any(|length| length.contains(place))) {
        let state = State::new();
        state.prepare();
        let mut damaged = bytes.clone();
        damaged[place] ^= 0x20;
        fs::write(state.path(), damaged).expect("written");
        fs::set_permissions(state.path(), fs::Permissions::from_mode(0o600)).expect("the owner's");
        fs::copy(&whole.root, &state.root).expect("the same root");
        state.assert_used(false, &format!("byte {place} of {}", bytes.len()));
    }
}

#[test]
fn an_end_that_was_cut_off_costs_what_it_held_and_is_written_over() {
    let state = State::new();
    state.keep(response(ADDRESS_TYPE, vec![pod_resource(pod("a", [10, 0, 0, 1]))], &[]));
    let whole = fs::metadata(state.path()).expect("there").len();
    state.keep(response(ADDRESS_TYPE, vec![pod_resource(pod("b", [10, 0, 0, 2]))], &[]));
    let longer = fs::metadata(state.path()).expect("there").len();
    for end in [whole + 1, whole + 10, longer - 1] {
        fs::OpenOptions::new().write(true).open(state.path()).and_then(|file| file.set_len(end)).expect("cut");
        assert_eq!(state.recall().0.versions(Kind::Address), versions(&[("a", "1")]), "cut at {end}");
        assert!(!state.aside().exists());
        state.keep(response(ADDRESS_TYPE, vec![pod_resource(pod("b", [10, 0, 0, 2]))], &[]));
        assert_eq!(state.recall().0.versions(Kind::Address), versions(&[("a", "1"), ("b", "1")]));
    }
}

#[test]
fn a_file_of_another_format_is_put_aside() {
    for (magic, used) in [(file::MAGIC, true), (b"culvert mesh 2\n", false), (b"someone else's\n", false)] {
        let state = State::new();
        state.keep_mesh();
        let mut bytes = fs::read(state.path()).expect("there");
        bytes[..magic.len()].copy_from_slice(magic);
        fs::write(state.path(), bytes).expect("written");
        state.assert_used(used, &String::from_utf8_lossy(magic));
    }
}

#[test]
fn a_file_that_is_too_large_is_put_aside() {
    let state = State::new();
    state.keep_mesh();
    fs::OpenOptions::new().write(true).open(state.path()).and_then(|file| file.set_len(file::FILE_MOST + 1)).expect("a hole");
    state.assert_used(false, "too large");
}

#[test]
fn a_file_does_not_grow_with_what_was_replaced() {
    let state = State::new();
    let (mut mirror, keeper) = state.recall();
    let mut keeper = keeper.expect("kept");
    let turns = 300;
    for turn in 0..=turns {
        let news = response(ADDRESS_TYPE, vec![large(turn), pod_resource(pod("a", [10, 0, 0, 1]))], &[]);
        let applied = mirror.apply(Kind::Address, &news, |_| false);
        wait(keeper.notes.send(Note::News(applied.news(news), mirror.bytes()))).expect("the disk is there");
    }
    fs::write(state.draft(), "what a killed agent left").expect("written");
    let news = response(ADDRESS_TYPE, vec![large(turns + 1)], &[]);
    wait(keeper.keep(news, mirror.bytes(), true));
    keeper.finish();
    let length = fs::metadata(state.path()).expect("there").len();
    assert!(length < SLACK + (3 << 20), "{length} bytes");
    let held = state.recall().0.versions(Kind::Address);
    assert_eq!(held, versions(&[("a", "1"), ("large", &(turns + 1).to_string())]));
}

#[test]
fn files_that_belong_to_a_node_go_with_it_and_others_stay() {
    let state = State::new();
    state.keep_mesh();
    for file in [state.aside(), state.draft(), state.place.directory.join("other.mesh")] {
        fs::write(file, "").expect("written");
    }
    forget(&state.place.directory, "node").expect("removed");
    let left =
        || fs::read_dir(&state.place.directory).expect("there").flatten().map(|entry| entry.file_name()).collect::<Vec<_>>();
    assert_eq!(left(), ["other.mesh"]);
    forget(&state.place.directory, "other").expect("removed");
    assert!(!state.place.directory.exists());
    forget(&state.place.directory, "other").expect("there is nothing to remove");
}

#[test]
fn no_bytes_make_reading_fail_otherwise_than_by_saying_so() {
    use proptest::prelude::*;

    let state = State::new();
    state.keep_mesh();
    let whole = fs::read(state.path()).expect("there");
    let strategy = (0..whole.len(), prop::collection::vec(any::<u8>(), 0..64), any::<bool>());
    proptest!(|((place, bytes, cut) in strategy)| {
        let mut changed = whole.clone();
        let end = if cut { changed.len() } else { (place + bytes.len()).min(whole.len()) };
        changed.splice(place..end, bytes);
        fs::write(state.path(), &changed).expect("written");
        let binding = state.place.binding().expect("a root");
        let mut mirror = empty();
        let _either = file::read(&state.path(), &binding, |response| mirror.recall(response));
        prop_assert!(!mirror.snapshot().synced());
    });
}

/// A state directory, and whose it is.
struct State {
    directory: TempDir,
    root: PathBuf,
    place: Place,
}

impl State {
    fn new() -> Self {
        let directory = TempDir::new().expect("a directory");
        let root = directory.path().join("root.pem");
        fs::write(&root, TestAuthority::new("root").root_pem()).expect("written");
        let endpoint =
            ControllerEndpoint::new("https://controller:15012", &root, &directory.path().join("token")).expect("legal");
        let place = Place { directory: directory.path().join("state"), node: "node".into(), endpoint };
        Self { directory, root, place }
    }

    fn endpoint(&self, url: &str) -> ControllerEndpoint {
        ControllerEndpoint::new(url, &self.root, &self.directory.path().join("token")).expect("legal")
    }

    fn prepare(&self) {
        file::prepare(&self.place.directory).expect("made");
    }

    fn path(&self) -> PathBuf {
        path_of(&self.place.directory, &self.place.node)
    }

    fn aside(&self) -> PathBuf {
        file::beside(&self.path(), ASIDE)
    }

    fn draft(&self) -> PathBuf {
        file::beside(&self.path(), file::DRAFT)
    }

    fn recall(&self) -> (Mirror, Option<Keeper>) {
        recall(self.place.clone(), empty)
    }

    /// An agent's life in which this response comes.
    fn keep(&self, news: DeltaDiscoveryResponse) {
        let (mut mirror, keeper) = self.recall();
        let mut keeper = keeper.expect("kept");
        let kind = Kind::of(&news.type_url).expect("a known type");
        let applied = mirror.apply(kind, &news, |_| false);
        assert!(applied.refused.is_empty(), "{:?}", applied.refused);
        wait(keeper.keep(applied.news(news), mirror.bytes(), true));
        keeper.finish();
    }

    /// Some of each type, with two pods.
    fn keep_mesh(&self) {
        let deny = security::Authorization { name: "deny".to_owned(), namespace: "shop".to_owned(), ..Default::default() };
        let pods = [("a", [10, 0, 0, 1]), ("b", [10, 0, 0, 2])].map(|(name, address)| pod_resource(pod(name, address)));
        self.keep(response(MESH_TYPE, vec![mesh_resource("td", &["10.0.0.0/8"])], &[]));
        self.keep(response(AUTHORIZATION_TYPE, vec![policy_resource(deny)], &[]));
        self.keep(response(ADDRESS_TYPE, pods.into(), &[]));
    }

    /// Asserts that what is there is used, or that it is put aside, nothing of it is held, and what comes next is kept in its place.
    fn assert_used(&self, used: bool, about: &str) {
        let (mirror, keeper) = self.recall();
        assert!(keeper.is_some(), "{about}");
        assert_eq!((mirror.size() > 0, fs::symlink_metadata(self.aside()).is_err()), (used, used), "{about}");
        assert!(mirror.snapshot().workloads().next().is_none(), "nothing is in force yet");
        if !used {
            fs::remove_file(self.aside()).expect("put aside");
            drop((mirror, keeper));
            self.keep(response(ADDRESS_TYPE, vec![pod_resource(pod("c", [10, 0, 0, 3]))], &[]));
            assert_eq!(self.recall().0.versions(Kind::Address), versions(&[("c", "1")]), "{about}");
        }
    }
}

impl Keeper {
    /// Waits until all is written.
    fn finish(self) {
        drop(self.notes);
        self.thread.join().expect("no panic");
    }
}

fn empty() -> Mirror {
    Mirror::new("node", "cluster.local".parse().expect("legal"))
}

fn version(version: &str, resource: Resource) -> Resource {
    Resource { version: version.to_owned(), ..resource }
}

/// A resource of which a hundred fill what a file may be longer than it must.
fn large(turn: usize) -> Resource {
    let large = crate::proto::workload::Workload { canonical_revision: "x".repeat(64 << 10), ..pod("large", [10, 0, 0, 2]) };
    version(&turn.to_string(), pod_resource(large))
}

fn versions(held: &[(&str, &str)]) -> std::collections::HashMap<String, String> {
    held.iter().map(|(name, version)| (uid(name), (*version).to_owned())).collect()
}

/// Where the lengths of a file's blocks are.
fn lengths(bytes: &[u8]) -> impl Iterator<Item = std::ops::Range<usize>> {
    let mut at = file::MAGIC.len();
    std::iter::from_fn(move || {
        let place = at..at + 4;
        let length = u32::from_le_bytes(bytes.get(place.clone())?.try_into().ok()?);
        at += 4 + 16 + length as usize;
        Some(place)
    })
}

fn wait<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime").block_on(work)
}
