//! The directory source against a real directory: what it sends when files come, change and go.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::{
    fs,
    io::Write as _,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use tempfile::TempDir;
use tokio::{sync::oneshot, time::timeout};
use weir_agent::{
    objects::Object,
    source::{Batch, Change, SourceError, SourceHandle, dir},
};

/// Longer than any wait should last.
const DEADLINE: Duration = Duration::from_secs(20);

struct Fixture {
    directory: TempDir,
    handle: SourceHandle,
    revision: u64,
}

impl Fixture {
    /// A source of a directory with these files, and its first batch.
    async fn start(files: &[(&str, &str)]) -> (Self, Batch) {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(directory.path().join(name), text).unwrap();
        }
        let handle = dir::spawn(directory.path()).unwrap();
        let mut fixture = Self {
            directory,
            handle,
            revision: 0,
        };
        let batch = fixture.batch().await;
        (fixture, batch)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        fs::write(self.path(name), text).unwrap();
    }

    async fn batch(&mut self) -> Batch {
        let batch = timeout(DEADLINE, self.handle.batches.recv()).await;
        let batch = batch
            .expect("no batch in time")
            .expect("the source has ended");
        self.revision += 1;
        assert_eq!(batch.revision, self.revision);
        assert!(batch.synced);
        batch
    }

    /// Asks for a rescan; its answer, and what was sent before it.
    async fn rescan(&mut self) -> (u64, Vec<Batch>) {
        let (reply, answer) = oneshot::channel();
        self.handle.rescan.send(reply).await.unwrap();
        let revision = timeout(DEADLINE, answer).await.unwrap().unwrap();
        let mut batches = Vec::new();
        while let Ok(batch) = self.handle.batches.try_recv() {
            self.revision += 1;
            assert_eq!(batch.revision, self.revision);
            batches.push(batch);
        }
        assert_eq!(revision, self.revision);
        (revision, batches)
    }

    /// What changes until a rescan has been answered.
    async fn changes(&mut self) -> Vec<String> {
        let (_, batches) = self.rescan().await;
        batches.iter().flat_map(changes).collect()
    }
}

/// `+Kind name` and `-Kind name`.
fn changes(batch: &Batch) -> Vec<String> {
    let changes = batch.changes.iter();
    changes
        .map(|change| match change {
            Change::Upsert(Object::Service(s)) => format!("+{} {:?}", s.name, s.cluster_ips),
            Change::Upsert(object) => format!("+{}", object.key()),
            Change::Delete(key) => format!("-{key}"),
        })
        .collect()
}

fn namespace(name: &str) -> String {
    format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}}}\n")
}

fn service(name: &str, ip: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: {ip}}}\n"
    )
}

const NONE: [&str; 0] = [];

#[tokio::test]
async fn the_first_batch_holds_all() {
    let (fixture, batch) = Fixture::start(&[
        ("a.yaml", &(namespace("one") + &namespace("two"))),
        (
            "b.json",
            r#"{"apiVersion":"v1","kind":"Node","metadata":{"name":"n"}}"#,
        ),
        (".hidden.yaml", &namespace("hidden")),
        ("a.yaml~", &namespace("backup")),
        ("notes.txt", "text"),
    ])
    .await;
    assert_eq!(
        changes(&batch),
        ["+Node n", "+Namespace one", "+Namespace two"]
    );
    assert_eq!(batch.errors, NONE);
    let path = fixture.directory.path().display().to_string();
    assert_eq!(fixture.handle.name, format!("dir:{path}"));
}

#[tokio::test]
async fn an_empty_directory_is_complete() {
    let (mut fixture, batch) = Fixture::start(&[]).await;
    assert_eq!((batch.revision, changes(&batch)), (1, vec![]));
    assert_eq!(fixture.rescan().await, (1, vec![]));
}

#[test]
fn what_cannot_start() {
    let directory = tempfile::tempdir().unwrap();
    let absent = directory.path().join("absent");
    let error = dir::spawn(&absent).unwrap_err();
    assert!(matches!(error, SourceError::Absent { .. }));
    let text = error.to_string();
    assert!(
        text.contains("absent: there is no such directory; create it"),
        "{text}"
    );
    fs::write(&absent, "").unwrap();
    let error = dir::spawn(&absent).unwrap_err();
    assert!(
        matches!(error, SourceError::NotADirectory { .. }),
        "{error}"
    );
}

#[tokio::test]
async fn edits_are_seen_as_differences_without_a_rescan() {
    let (mut fixture, _) =
        Fixture::start(&[("a.yaml", &(namespace("one") + &service("s", "10.0.0.1")))]).await;
    // Written in place.
    fixture.write("a.yaml", namespace("one") + &service("s", "10.0.0.2"));
    assert_eq!(changes(&fixture.batch().await), ["+default/s [10.0.0.2]"]);
    // Replaced by a rename, as editors do.
    fixture.write(".a.yaml.new", namespace("one") + &namespace("three"));
    fs::rename(fixture.path(".a.yaml.new"), fixture.path("a.yaml")).unwrap();
    assert_eq!(
        changes(&fixture.batch().await),
        ["-Service default/s", "+Namespace three"]
    );
    fs::rename(fixture.path("a.yaml"), fixture.path("b.yaml")).unwrap();
    fixture.write("c.yaml", namespace("four"));
    // The renamed file says nothing new.
    assert_eq!(changes(&fixture.batch().await), ["+Namespace four"]);
    fs::remove_file(fixture.path("b.yaml")).unwrap();
    assert_eq!(
        changes(&fixture.batch().await),
        ["-Namespace one", "-Namespace three"]
    );
    symlink(fixture.path("c.yaml"), fixture.path("d.yaml")).unwrap();
    let batch = fixture.batch().await;
    assert_eq!((changes(&batch), batch.errors.len()), (vec![], 1));
    fs::remove_file(fixture.path("d.yaml")).unwrap();
    assert_eq!(fixture.batch().await.errors, NONE);
    fs::hard_link(fixture.path("c.yaml"), fixture.path("b.yaml")).unwrap();
    assert_eq!(fixture.batch().await.errors.len(), 1);
}

#[tokio::test]
async fn a_rescan_answers_after_the_batch() {
    let (mut fixture, _) = Fixture::start(&[]).await;
    for index in 0..100 {
        fixture.write("a.yaml", service("s", &format!("10.0.0.{}", index + 1)));
        let (revision, batches) = fixture.rescan().await;
        let last = batches.iter().flat_map(changes).next_back();
        assert_eq!(revision, fixture.revision);
        assert_eq!(last, Some(format!("+default/s [10.0.0.{}]", index + 1)));
    }
}

#[tokio::test]
async fn a_renamed_file_is_no_change() {
    let (mut fixture, _) = Fixture::start(&[("0.yaml", &service("s", "10.0.0.1"))]).await;
    for index in 0..200 {
        let (from, to) = (format!("{index}.yaml"), format!("{}.yaml", index + 1));
        let (reply, answer) = oneshot::channel();
        fixture.handle.rescan.send(reply).await.unwrap();
        fs::rename(fixture.path(&from), fixture.path(&to)).unwrap();
        timeout(DEADLINE, answer).await.unwrap().unwrap();
    }
    assert_eq!(fixture.rescan().await, (1, vec![]));
    // Over another file, too.
    fixture.write("a.yaml", service("s", "10.0.0.1"));
    assert_eq!(fixture.changes().await, NONE);
    let revision = fixture.revision;
    for index in 0..200 {
        let (from, to) = if index % 2 == 0 {
            ("200.yaml", "a.yaml")
        } else {
            ("a.yaml", "200.yaml")
        };
        let (reply, answer) = oneshot::channel();
        fixture.handle.rescan.send(reply).await.unwrap();
        fs::rename(fixture.path(from), fixture.path(to)).unwrap();
        timeout(DEADLINE, answer).await.unwrap().unwrap();
    }
    let (_, batches) = fixture.rescan().await;
    assert!(batches.iter().all(|b| b.changes.is_empty()), "{batches:?}");
    assert!(fixture.revision > revision, "one error less");
}

#[tokio::test]
async fn mistakes_keep_the_last_good_state() {
    let good = namespace("one") + &service("s", "10.0.0.1") + &namespace("two");
    let (mut fixture, _) = Fixture::start(&[("a.yaml", &good)]).await;
    let path = fixture.path("a.yaml").display().to_string();

    // A bad value: its object stays as it was, the others change.
    fixture.write("a.yaml", namespace("three") + &service("s", "10.0.0"));
    let batch = fixture.batch().await;
    assert_eq!(
        changes(&batch),
        ["-Namespace one", "+Namespace three", "-Namespace two"]
    );
    assert_eq!(
        batch.errors,
        [format!(
            "{path}:6: Service default/s: spec.clusterIPs[0]: \"10.0.0\" is not an IP address"
        )]
    );

    // A syntax error: nobody knows what stood there, so everything missing stays.
    fixture.write("a.yaml", namespace("four") + "---\nkind: [\n");
    let batch = fixture.batch().await;
    assert_eq!(changes(&batch), ["+Namespace four"]);
    assert!(
        batch.errors[0].starts_with(&format!("{path}:")),
        "{:?}",
        batch.errors
    );
    let kept = "Service default/s, Namespace three stand no longer in it and stay in force";
    assert!(batch.errors[1].contains(kept), "{:?}", batch.errors);

    // The same while it is no text at all, and while it cannot be found.
    fixture.write("a.yaml", b"\xff\xfe");
    let batch = fixture.batch().await;
    assert_eq!(
        (changes(&batch), batch.errors),
        (vec![], vec![format!("{path}: is not UTF-8: see byte 0")])
    );
    fs::remove_file(fixture.path("a.yaml")).unwrap();
    symlink("nowhere", fixture.path("a.yaml")).unwrap();
    let (_, batches) = fixture.rescan().await;
    let last = batches.last().unwrap();
    assert!(
        last.errors[0].contains("cannot be read: No such file"),
        "{:?}",
        last.errors
    );

    // Mended: the differences to what was in force.
    fs::remove_file(fixture.path("a.yaml")).unwrap();
    fixture.write("a.yaml", namespace("four") + &service("s", "10.0.0.2"));
    let (_, batches) = fixture.rescan().await;
    assert_eq!(batches.last().unwrap().errors, NONE);
}

#[tokio::test]
async fn the_same_object_in_two_files() {
    let (mut fixture, batch) = Fixture::start(&[
        ("b.yaml", &service("s", "10.0.0.2")),
        (
            "c.yaml",
            &(namespace("one") + &service("s", "10.0.0.3") + &namespace("one")),
        ),
    ])
    .await;
    assert_eq!(changes(&batch), ["+default/s [10.0.0.2]", "+Namespace one"]);
    let path = |name| fixture.path(name).display().to_string();
    let (b, c) = (path("b.yaml"), path("c.yaml"));
    assert_eq!(
        batch.errors,
        [
            format!("{c}:11: Namespace one is in line 2 already, which counts; remove one"),
            format!(
                "{b}:2 and {c}:6: Service default/s stands in several files: the first by name counts; \
                 remove the others"
            ),
        ]
    );
    fixture.write("a.yaml", service("s", "10.0.0.1"));
    assert_eq!(changes(&fixture.batch().await), ["+default/s [10.0.0.1]"]);
    // Not in force: no change.
    fixture.write("c.yaml", service("s", "10.0.0.4"));
    assert_eq!(changes(&fixture.batch().await), ["-Namespace one"]);
    fs::remove_file(fixture.path("a.yaml")).unwrap();
    assert_eq!(changes(&fixture.batch().await), ["+default/s [10.0.0.2]"]);
    fs::remove_file(fixture.path("b.yaml")).unwrap();
    let batch = fixture.batch().await;
    assert_eq!(changes(&batch), ["+default/s [10.0.0.4]"]);
    assert_eq!(batch.errors, NONE);
}

#[tokio::test]
async fn a_file_counts_when_it_is_closed() {
    let text = service("s", "10.0.0.1") + &namespace("one");
    let (mut fixture, _) = Fixture::start(&[("a.yaml", &text)]).await;
    let mut file = fs::File::create(fixture.path("a.yaml")).unwrap();
    assert_eq!(fixture.rescan().await, (1, vec![]), "it was only emptied");
    file.write_all(namespace("two").as_bytes()).unwrap();
    assert_eq!(fixture.rescan().await, (1, vec![]), "it is half written");
    file.write_all(namespace("one").as_bytes()).unwrap();
    drop(file);
    assert_eq!(
        fixture.changes().await,
        ["-Service default/s", "+Namespace two"]
    );
}

/// As the kubelet mounts a ConfigMap: files are links into `..data`, a link that is replaced.
fn mount_volume(directory: &Path, version: &str, text: &str) {
    let data = directory.join(format!("..{version}"));
    fs::create_dir(&data).unwrap();
    fs::write(data.join("a.yaml"), text).unwrap();
    symlink(format!("..{version}"), directory.join("..data_tmp")).unwrap();
    fs::rename(directory.join("..data_tmp"), directory.join("..data")).unwrap();
}

#[tokio::test]
async fn a_config_map_volume() {
    let (mut fixture, _) = Fixture::start(&[]).await;
    mount_volume(fixture.directory.path(), "1", &service("s", "10.0.0.1"));
    symlink("..data/a.yaml", fixture.path("a.yaml")).unwrap();
    assert_eq!(changes(&fixture.batch().await), ["+default/s [10.0.0.1]"]);
    mount_volume(fixture.directory.path(), "2", &service("s", "10.0.0.2"));
    assert_eq!(changes(&fixture.batch().await), ["+default/s [10.0.0.2]"]);
}

#[tokio::test]
async fn a_path_that_leads_through_a_volume_link() {
    let root = tempfile::tempdir().unwrap();
    mount_volume(root.path(), "1", &service("s", "10.0.0.1"));
    let handle = dir::spawn(&root.path().join("..data")).unwrap();
    let mut fixture = Fixture {
        directory: root,
        handle,
        revision: 0,
    };
    assert_eq!(changes(&fixture.batch().await), ["+default/s [10.0.0.1]"]);
    mount_volume(fixture.directory.path(), "2", &service("s", "10.0.0.2"));
    assert_eq!(changes(&fixture.batch().await), ["+default/s [10.0.0.2]"]);
    // The watch follows the link.
    fs::write(fixture.path("..2/b.yaml"), namespace("two")).unwrap();
    assert_eq!(changes(&fixture.batch().await), ["+Namespace two"]);
}

#[tokio::test]
async fn the_directory_goes_and_comes_back() {
    let root = tempfile::tempdir().unwrap();
    let parent = root.path().join("parent");
    let path = parent.join("objects");
    let make = |text: String| {
        // Complete before it has its name.
        let other = parent.join("other");
        fs::create_dir_all(&other).unwrap();
        fs::write(other.join("a.yaml"), text).unwrap();
        fs::rename(other, &path).unwrap();
    };
    make(namespace("one") + &namespace("two"));
    let handle = dir::spawn(&path).unwrap();
    let mut fixture = Fixture {
        directory: root,
        handle,
        revision: 0,
    };
    fixture.batch().await;
    for round in 0..3 {
        // Moved away, removed, removed with its parent.
        match round {
            0 => fs::rename(&path, parent.join("away")).unwrap(),
            1 => fs::rename(&path, fixture.path("away")).unwrap(),
            _ => {
                fs::rename(&parent, fixture.path("gone")).unwrap();
                fs::remove_dir_all(fixture.path("gone/objects")).unwrap();
            }
        }
        let (_, batches) = fixture.rescan().await;
        let batch = match batches.into_iter().next_back() {
            Some(batch) => batch,
            None => fixture.batch().await,
        };
        let gone = format!(
            "{}: the directory is gone; its last objects stay in force",
            path.display()
        );
        assert_eq!((changes(&batch), batch.errors), (vec![], vec![gone]));
        make(namespace("one") + &namespace(&format!("round-{round}")));
        let batch = fixture.batch().await;
        assert_eq!(changes(&batch).len(), 2, "{batch:?}");
        let added = format!("+Namespace round-{round}");
        assert!(changes(&batch).contains(&added), "{batch:?}");
        assert_eq!(batch.errors, NONE);
        // And it is watched again.
        fs::write(path.join("b.yaml"), namespace(&format!("more-{round}"))).unwrap();
        assert_eq!(
            changes(&fixture.batch().await),
            [format!("+Namespace more-{round}")]
        );
        fs::remove_file(path.join("b.yaml")).unwrap();
        assert_eq!(
            changes(&fixture.batch().await),
            [format!("-Namespace more-{round}")]
        );
    }
}

#[tokio::test]
async fn a_file_that_is_too_large_or_nested_too_deep_keeps_its_objects() {
    let (mut fixture, _) =
        Fixture::start(&[("a.yaml", &namespace("one")), ("b.yaml", &namespace("two"))]).await;
    let large = fs::File::create(fixture.path(".large")).unwrap();
    large.set_len((128 << 20) + 1).unwrap();
    fs::rename(fixture.path(".large"), fixture.path("a.yaml")).unwrap();
    let batch = fixture.batch().await;
    let error = format!(
        "{}: cannot be read: it is larger than 128 MiB; split it into several files",
        fixture.path("a.yaml").display()
    );
    assert_eq!((changes(&batch), batch.errors), (vec![], vec![error]));
    fixture.write(
        "a.yaml",
        namespace("three") + "---\na: " + &"[".repeat(100_000),
    );
    let batch = fixture.batch().await;
    assert_eq!(changes(&batch), ["+Namespace three"]);
    let place = format!("{}:6: nested deeper", fixture.path("a.yaml").display());
    assert!(batch.errors[0].starts_with(&place), "{:?}", batch.errors);
    fixture.write("b.yaml", namespace("four"));
    let changed = changes(&fixture.batch().await);
    assert_eq!(changed, ["+Namespace four", "-Namespace two"]);
}

#[tokio::test]
async fn the_source_ends_with_its_handle() {
    let (fixture, _) = Fixture::start(&[]).await;
    let rescan = fixture.handle.rescan.clone();
    drop(fixture);
    timeout(DEADLINE, rescan.closed())
        .await
        .expect("the thread goes on");
}
