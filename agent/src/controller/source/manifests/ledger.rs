//! Which object comes from which file, and which of them are in force.
//!
//! Enters: files as they are read, or that they are gone. Leaves: changes to the objects in force, and messages for the operator.
//! When two files hold one object, the first by name wins. What a bad file or document held before stays in force; for a
//! policy that made no sense from the start, something strict stands in: what cannot be decided is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing::{error, info, warn};

use super::parse::{FileError, Item, Place};
use crate::controller::source::stand_in::effect_of;
use crate::controller::source::{Change, Object, ObjectKey};

/// What the directory's files hold.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    files: BTreeMap<PathBuf, File>,
    objects: BTreeMap<ObjectKey, BTreeMap<PathBuf, Held>>,
    in_force: BTreeMap<ObjectKey, [u8; 32]>,
    touched: BTreeSet<ObjectKey>,
}

#[derive(Debug, Default)]
struct File {
    content: Option<[u8; 32]>,
    keys: BTreeSet<ObjectKey>,
    bad: bool,
}

#[derive(Debug)]
struct Held {
    object: Arc<Object>,
    /// It stands in for one that never made sense.
    stand_in: bool,
    digest: [u8; 32],
    origin: Arc<str>,
}

impl Ledger {
    /// Whether `path` was last read with this content.
    pub(super) fn is_current(&self, path: &Path, content: &[u8; 32]) -> bool {
        self.files.get(path).is_some_and(|file| file.content.as_ref() == Some(content))
    }

    /// Notes that a file is gone, and with it its objects.
    pub(super) fn file_gone(&mut self, path: &Path) {
        let Some(file) = self.files.remove(path) else { return };
        for key in file.keys {
            self.let_go(path, key);
        }
    }

    /// Notes that a file's bytes could not be had or make no sense; what it held before stays in force.
    pub(super) fn file_bad(&mut self, path: &Path, content: Option<[u8; 32]>, problem: &dyn std::fmt::Display) {
        let file = self.files.entry(path.to_owned()).or_default();
        // A file that cannot be opened has no content to tell it by: say so once.
        let told = file.bad && content.is_none() && file.content.is_none();
        file.content = content;
        file.bad = true;
        match (told, file.keys.len()) {
            (true, _) => {}
            // Not even what it is for can be told: nothing can stand in for it.
            (false, 0) => {
                error!("{}: {problem}; {}, and if there is a policy in it, that is not in force", path.display(), kept(0))
            }
            (false, objects) => warn!("{}: {problem}; {}", path.display(), kept(objects)),
        }
    }

    /// Notes what a file holds now.
    pub(super) fn file_read(&mut self, path: &Path, content: [u8; 32], parsed: Result<Vec<Item>, FileError>) {
        let items = match parsed {
            Ok(items) => items,
            Err(error) => return self.file_bad(path, Some(content), &error),
        };
        let before = self.files.remove(path).unwrap_or_default();
        let mut file = File { content: Some(content), ..File::default() };
        let mut problems = Vec::new();
        for item in items {
            match item.object {
                Ok((object, digest)) => {
                    let key = object.key();
                    if !file.keys.insert(key.clone()) {
                        warn!("{}, {}: {key} is in this file already; the first one is used", path.display(), item.place);
                        continue;
                    }
                    let origin = format!("{}, {}", path.display(), item.place).into();
                    self.take(path, key, Held { object: Arc::new(object), stand_in: false, digest, origin });
                }
                Err(error) => {
                    let standing_in =
                        item.stand_in.and_then(|stand_in| self.stand_in(path, &mut file.keys, item.place, stand_in));
                    problems.push((item.place, error, standing_in));
                }
            }
        }
        file.bad = !problems.is_empty();
        let missing: Vec<_> = before.keys.difference(&file.keys).cloned().collect();
        for (place, error, standing_in) in &problems {
            match standing_in {
                Some(effect) => error!("{}, {place}: {error}; until it is put right, {effect}", path.display()),
                None => warn!("{}, {place}: {error}; {}", path.display(), kept(missing.len())),
            }
        }
        if file.bad {
            // Which of them the bad documents are cannot always be told.
            file.keys.extend(missing);
        } else {
            for key in missing {
                self.let_go(path, key);
            }
            if before.bad {
                info!("{}: all documents are good again", path.display());
            }
        }
        self.files.insert(path.to_owned(), file);
    }

    /// The changes to the objects in force since the last call: removals first, then the rest by kind and name.
    pub(super) fn take_changes(&mut self) -> Vec<Change> {
        let (mut removed, mut applied) = (Vec::new(), Vec::new());
        for key in std::mem::take(&mut self.touched) {
            let holders = self.objects.get(&key);
            let winner = holders.and_then(|holders| {
                let good = holders.values().find(|held| !held.stand_in);
                good.or_else(|| holders.values().next())
            });
            match winner {
                Some(held) if self.in_force.get(&key) == Some(&held.digest) => {}
                Some(held) => {
                    self.in_force.insert(key, held.digest);
                    applied.push(Change::Applied { object: Arc::clone(&held.object), origin: Arc::clone(&held.origin) });
                }
                None => {
                    if self.in_force.remove(&key).is_some() {
                        removed.push(Change::Removed(key));
                    }
                }
            }
        }
        removed.extend(applied);
        removed
    }

    /// Puts a stand-in in the place of a policy that makes no sense and never did. Gives its effect in words; none when what the policy
    /// said before stays in force.
    fn stand_in(
        &mut self,
        path: &Path,
        keys: &mut BTreeSet<ObjectKey>,
        place: Place,
        (object, digest): (Object, [u8; 32]),
    ) -> Option<&'static str> {
        let key = object.key();
        let before = self.objects.get(&key).and_then(|holders| holders.get(path));
        if keys.contains(&key) || before.is_some_and(|held| !held.stand_in) {
            return None;
        }
        let effect = effect_of(&object);
        keys.insert(key.clone());
        let origin = format!("{}, {place}", path.display()).into();
        self.take(path, key, Held { object: Arc::new(object), stand_in: true, digest, origin });
        Some(effect)
    }

    fn take(&mut self, path: &Path, key: ObjectKey, held: Held) {
        let holders = self.objects.entry(key.clone()).or_default();
        if holders.insert(path.to_owned(), held).is_none()
            && holders.len() > 1
            && let Some(first) = holders.keys().next()
        {
            let others: Vec<_> = holders.keys().map(|path| path.display().to_string()).collect();
            warn!("{key} is in {}: {} is used; remove the others", others.join(" and in "), first.display());
        }
        self.touched.insert(key);
    }

    fn let_go(&mut self, path: &Path, key: ObjectKey) {
        if let Some(holders) = self.objects.get_mut(&key) {
            holders.remove(path);
            if holders.is_empty() {
                self.objects.remove(&key);
            }
        }
        self.touched.insert(key);
    }
}

/// What a message says of the objects that a bad file or document held before.
fn kept(objects: usize) -> String {
    match objects {
        0 => "it is left out until it is put right".to_owned(),
        1 => "what it said before stays in force until it is put right".to_owned(),
        many => format!("what its {many} objects said before stays in force until it is put right"),
    }
}
