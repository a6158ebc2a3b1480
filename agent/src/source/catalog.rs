//! What the files of a directory hold, file by file, and which object is in force where they
//! overlap. Pure bookkeeping: the directory source tells it what the files say, and takes the
//! differences.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, btree_map},
    path::{Path, PathBuf},
};

use super::{Change, yaml::Manifest};
use crate::objects::{Object, ObjectKey};

/// Files by name, and the objects in them.
#[derive(Debug)]
pub(super) struct Catalog {
    directory: PathBuf,
    files: BTreeMap<String, File>,
    /// The files that hold an object; the first by name is the one in force.
    holders: HashMap<ObjectKey, BTreeSet<String>>,
    /// Objects that more than one file holds.
    contested: BTreeSet<ObjectKey>,
    /// What was in force at the last [`Catalog::take_changes`], of what was touched since.
    before: BTreeMap<ObjectKey, Option<Object>>,
}

#[derive(Debug, Default)]
struct File {
    objects: BTreeMap<ObjectKey, Held>,
    errors: Vec<String>,
}

#[derive(Debug)]
struct Held {
    line: usize,
    object: Object,
}

impl Catalog {
    /// Of an empty directory. Its path stands before the file names in errors.
    pub(super) fn new(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
            files: BTreeMap::new(),
            holders: HashMap::new(),
            contested: BTreeSet::new(),
            before: BTreeMap::new(),
        }
    }

    /// The names of the files.
    pub(super) fn files(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    /// The file says this now. What it cannot say because of a mistake, it says as before.
    pub(super) fn set(&mut self, name: &str, manifest: Manifest) {
        let mut old = self.withdraw(name);
        let path = self.directory.join(name);
        let mut file = File::default();
        for located in manifest.objects {
            let held = Held {
                line: located.line,
                object: located.object,
            };
            match file.objects.entry(held.object.key()) {
                btree_map::Entry::Vacant(place) => {
                    place.insert(held);
                }
                btree_map::Entry::Occupied(first) => file.errors.push(format!(
                    "{}:{}: {} is in line {} already, which counts; remove one",
                    path.display(),
                    held.line,
                    first.key(),
                    first.get().line,
                )),
            }
        }
        let mut keep_all = false;
        for error in manifest.errors {
            let (line, cause) = (error.line, error.cause);
            file.errors
                .push(format!("{}:{line}: {cause}", path.display()));
            match error.object {
                Some(key) => {
                    if let Some(held) = old.objects.remove(&key) {
                        file.objects.entry(key).or_insert(held);
                    }
                }
                // It might hold any of the objects that are missing now.
                None => keep_all = true,
            }
        }
        if keep_all {
            let gone = |key: &&ObjectKey| !file.objects.contains_key(key);
            let kept: Vec<String> = old
                .objects
                .keys()
                .filter(gone)
                .map(ToString::to_string)
                .collect();
            if let Some(note) = still_in_force(&kept) {
                file.errors.push(format!("{}: {note}", path.display()));
            }
            for (key, held) in old.objects {
                file.objects.entry(key).or_insert(held);
            }
        }
        self.enter(name, file);
    }

    /// The file is there, but cannot be read: its objects stay in force.
    pub(super) fn set_unreadable(&mut self, name: &str, cause: &str) {
        let path = self.directory.join(name);
        let file = self.files.entry(name.to_owned()).or_default();
        file.errors = vec![format!("{}: {cause}", path.display())];
    }

    /// The file is gone.
    pub(super) fn remove(&mut self, name: &str) {
        self.withdraw(name);
    }

    /// What is in force now and was not at the last call, and the reverse.
    pub(super) fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.before)
            .into_iter()
            .filter_map(|(key, before)| match (before, self.in_force(&key)) {
                (before, Some(now)) if before.as_ref() != Some(now) => {
                    Some(Change::Upsert(now.clone()))
                }
                (Some(_), None) => Some(Change::Delete(key)),
                _ => None,
            })
            .collect()
    }

    /// Everything that is wrong with the files now, by file name.
    pub(super) fn errors(&self) -> Vec<String> {
        let of_files = self
            .files
            .values()
            .flat_map(|file| file.errors.iter().cloned());
        let contested = self.contested.iter().map(|key| {
            let places: Vec<String> = self.holders[key]
                .iter()
                .map(|name| {
                    let path = self.directory.join(name);
                    format!("{}:{}", path.display(), self.files[name].objects[key].line)
                })
                .collect();
            format!(
                "{}: {key} stands in several files: the first by name counts; remove the others",
                places.join(" and ")
            )
        });
        of_files.chain(contested).collect()
    }

    fn in_force(&self, key: &ObjectKey) -> Option<&Object> {
        let name = self.holders.get(key)?.first()?;
        Some(&self.files.get(name)?.objects.get(key)?.object)
    }

    /// Takes a file out, and its objects out of force.
    fn withdraw(&mut self, name: &str) -> File {
        let Some(file) = self.files.remove(name) else {
            return File::default();
        };
        for (key, held) in &file.objects {
            let Some(holders) = self.holders.get_mut(key) else {
                continue;
            };
            if holders.first().is_some_and(|first| first == name) {
                self.before
                    .entry(key.clone())
                    .or_insert_with(|| Some(held.object.clone()));
            }
            holders.remove(name);
            match holders.len() {
                0 => {
                    self.holders.remove(key);
                }
                1 => {
                    self.contested.remove(key);
                }
                _ => {}
            }
        }
        file
    }

    /// Puts a file in, and its objects into force where no file before it has them.
    fn enter(&mut self, name: &str, file: File) {
        for key in file.objects.keys() {
            let holders = self.holders.entry(key.clone()).or_default();
            if !self.before.contains_key(key) && holders.first().is_none_or(|f| name < f.as_str()) {
                let before = holders.first().and_then(|first| {
                    let held = self.files.get(first)?.objects.get(key)?;
                    Some(held.object.clone())
                });
                self.before.insert(key.clone(), before);
            }
            holders.insert(name.to_owned());
            if holders.len() > 1 {
                self.contested.insert(key.clone());
            }
        }
        self.files.insert(name.to_owned(), file);
    }
}

/// Says of objects that are kept though the file no longer shows them: `None` for none.
fn still_in_force(kept: &[String]) -> Option<String> {
    const SHOWN: usize = 5;
    let shown = kept
        .iter()
        .take(SHOWN)
        .cloned()
        .collect::<Vec<_>>()
        .join(", ");
    let (verb, more) = match kept.len() {
        0 => return None,
        1 => ("stands no longer in it and stays", String::new()),
        count if count <= SHOWN => ("stand no longer in it and stay", String::new()),
        count => (
            "stand no longer in it and stay",
            format!(" and {} more", count - SHOWN),
        ),
    };
    Some(format!(
        "{shown}{more} {verb} in force until its mistakes are mended: what cannot be read might be that"
    ))
}
