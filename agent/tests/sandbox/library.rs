//! The library of skills, as commands see it.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use cortex_agent::exec::CommandRequest;
use cortex_shared::policy::Mode;
use tempfile::TempDir;

use crate::support::{in_workspace, run, script, succeeds_outside};

/// A library with one skill, in which only the mount keeps a command from writing: everybody may.
struct Shelf {
    folder: TempDir,
    library: PathBuf,
}

impl Shelf {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let library = folder.path().join("library");
        let version = library.join(".versions/lint@1");
        fs::create_dir_all(&version).unwrap();
        fs::write(version.join("run.sh"), "#!/bin/sh\necho linted\n").unwrap();
        fs::write(version.join("data"), "data").unwrap();
        symlink(".versions/lint@1", library.join("lint")).unwrap();
        for (path, mode) in [("run.sh", 0o777), ("data", 0o666), (".", 0o777)] {
            fs::set_permissions(version.join(path), fs::Permissions::from_mode(mode)).unwrap();
        }
        fs::set_permissions(&library, fs::Permissions::from_mode(0o777)).unwrap();
        Self { folder, library }
    }

    fn seen_by(&self, request: CommandRequest) -> CommandRequest {
        CommandRequest { library: Some(self.library.clone()), ..request }
    }

    fn names(&self) -> Vec<PathBuf> {
        let mut names: Vec<PathBuf> = fs::read_dir(self.library.join("lint"))
            .unwrap()
            .chain(fs::read_dir(&self.library).unwrap())
            .map(|entry| entry.unwrap().path())
            .collect();
        names.sort();
        names
    }
}

#[tokio::test]
async fn a_command_runs_skills_by_every_way_that_leads_to_them() {
    let shelf = Shelf::new();
    let ways = [
        "/library/lint/run.sh".to_owned(),
        "\"$CORTEX_LIBRARY/lint/run.sh\"".to_owned(),
        // As links in workspaces lead there.
        format!("{}/lint/run.sh", shelf.library.display()),
    ];
    let workspace = TempDir::new().unwrap();
    symlink(&shelf.library, workspace.path().join("door")).unwrap();
    for way in &ways {
        for request in [script(way), in_workspace(way, workspace.path())] {
            let ran = run(shelf.seen_by(request)).await;
            assert!(ran.succeeded() && ran.stdout == "linted\n", "{way}: {ran:?}");
        }
    }
    let ran = run(shelf.seen_by(in_workspace("door/lint/run.sh", workspace.path()))).await;
    assert_eq!(ran.stdout, "linted\n", "{ran:?}");
    // What is placed while a command runs is seen by the next one, whenever its sandbox was made.
    fs::write(shelf.library.join("lint/new"), "new").unwrap();
    let ran = run(shelf.seen_by(script("cat /library/lint/new"))).await;
    assert_eq!(ran.stdout, "new", "{ran:?}");
    let permissive = CommandRequest {
        mode: Mode::Permissive,
        ..in_workspace("door/lint/run.sh; \"$CORTEX_LIBRARY/lint/run.sh\"", workspace.path())
    };
    let ran = run(shelf.seen_by(permissive)).await;
    assert_eq!(ran.stdout, "linted\nlinted\n", "{ran:?}");
}

#[tokio::test]
async fn nothing_in_the_library_can_be_changed_by_a_strict_command() {
    let deeds = [
        "echo x >> lint/data",
        "echo x > lint/new",
        "rm lint/data",
        "mv lint/data lint/other",
        "truncate -s 0 lint/data",
        "ln -s data lint/link",
        "ln lint/data lint/second",
        "rm lint",
        "mkdir other",
        "mv lint moved",
        "touch -d 2000-01-01 lint/data",
    ];
    for deed in deeds {
        let control = Shelf::new();
        assert!(succeeds_outside(deed, &control.library), "outside, {deed} is possible");
        let shelf = Shelf::new();
        let before = shelf.names();
        for place in ["/library".to_owned(), shelf.library.display().to_string()] {
            let ran = run(shelf.seen_by(script(&format!("cd {place} && {deed}")))).await;
            assert!(!ran.succeeded(), "{deed}: {ran:?}");
            assert!(ran.stderr.contains("Read-only file system"), "{deed}: {ran:?}");
        }
        assert_eq!(shelf.names(), before, "{deed}");
        assert_eq!(fs::read(shelf.library.join("lint/data")).unwrap(), b"data", "{deed}");
    }
}

#[tokio::test]
async fn there_is_none_where_there_is_none_and_a_link_is_none() {
    let shelf = Shelf::new();
    let secret = shelf.folder.path().join("secret");
    fs::create_dir(&secret).unwrap();
    let link = shelf.folder.path().join("link");
    symlink(&secret, &link).unwrap();
    let missing = shelf.folder.path().join("missing");
    for library in [None, Some(link), Some(missing)] {
        let request = CommandRequest { library: library.clone(), ..script("ls /library") };
        let ran = run(request).await;
        assert!(!ran.succeeded(), "{library:?}: {ran:?}");
    }
    assert!(Path::new(&secret).exists());
}

#[tokio::test]
async fn the_door_in_a_workspace_is_read_only_for_commands() {
    let workspace = TempDir::new().unwrap();
    fs::create_dir(workspace.path().join(".cortex")).unwrap();
    symlink("/nowhere", workspace.path().join(".cortex/library")).unwrap();
    for deed in ["ln -sfn /tmp .cortex/library", "rm .cortex/library", "mv .cortex x"] {
        let ran = run(in_workspace(deed, workspace.path())).await;
        assert!(!ran.succeeded(), "{deed}: {ran:?}");
        let door = fs::read_link(workspace.path().join(".cortex/library")).unwrap();
        assert_eq!(door, Path::new("/nowhere"), "{deed}");
    }
    let deed = "ln -sfn /tmp .cortex/library";
    assert!(succeeds_outside(deed, workspace.path()), "outside it is possible");
}
