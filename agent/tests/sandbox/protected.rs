//! What programs outside would obey: pinned, watched while a command runs, and compared after it.

use std::path::{Path, PathBuf};

use cortex_agent::exec::CommandVerdict;
use tempfile::TempDir;

use crate::support::{PLENTY, Running, in_workspace, run};

struct Workspace(TempDir);

impl Workspace {
    fn with(files: &[&str]) -> Self {
        let workspace = Self(TempDir::new().unwrap());
        files.iter().for_each(|file| workspace.write(file, "original"));
        workspace
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        std::fs::write(self.path(name), text).unwrap();
    }

    fn link(&self, to: &str, name: &str) {
        std::os::unix::fs::symlink(to, self.path(name)).unwrap();
    }

    fn is_original(&self, name: &str) -> bool {
        std::fs::read(self.path(name)).is_ok_and(|text| text == b"original")
    }
}

/// What somebody outside does with a name in a workspace.
type Act = (&'static str, fn(&Workspace), &'static str);

fn exchange(one: &Path, other: &Path) {
    let flags = rustix::fs::RenameFlags::EXCHANGE;
    rustix::fs::renameat_with(rustix::fs::CWD, one, rustix::fs::CWD, other, flags).unwrap();
}

#[tokio::test]
async fn a_command_ends_when_somebody_outside_takes_the_protection_of_a_name_away() {
    let acts: [Act; 6] = [
        (
            "git config",
            |w| {
                w.write(".git/config.lock", "new");
                std::fs::rename(w.path(".git/config.lock"), w.path(".git/config")).unwrap();
            },
            ".git/config",
        ),
        (
            "a deletion",
            |w| {
                std::fs::remove_file(w.path(".envrc")).unwrap();
            },
            ".envrc",
        ),
        (
            "an exchange",
            |w| {
                w.write("stage/other", "new");
                exchange(&w.path("stage/other"), &w.path(".envrc"));
            },
            ".envrc",
        ),
        (
            "a directory moved away",
            |w| std::fs::rename(w.path(".git/hooks"), w.path(".git/off")).unwrap(),
            ".git/hooks",
        ),
        (
            "a repository moved away",
            |w| std::fs::rename(w.path(".git"), w.path("off")).unwrap(),
            ".git",
        ),
        (
            "a submodule's directories moved away",
            |w| std::fs::rename(w.path(".git/modules/a/sub"), w.path("off")).unwrap(),
            ".git/modules/a/sub",
        ),
    ];
    for (what, act, name) in acts {
        let workspace = Workspace::with(&[
            ".envrc",
            ".git/config",
            ".git/hooks/x",
            ".git/modules/a/sub/HEAD",
            ".git/modules/a/sub/config",
        ]);
        let text = "echo ready; for i in {1..3000}; do sleep 0.01; done; echo survived";
        let mut running = Running::start(in_workspace(text, workspace.0.path()), PLENTY);
        running.until_output("ready").await;
        act(&workspace);
        let ran = running.finish().await;
        assert_eq!(ran.exit.verdict, CommandVerdict::Failed, "{what}: {ran:?}");
        assert_eq!(ran.exit.exit_code, 125, "{what}");
        let reason = ran.exit.reason.unwrap();
        assert!(reason.contains(&format!("/{name}")), "{what}: {reason}");
        let hint = ran.exit.hint.unwrap();
        assert!(hint.contains(name), "{what}: what changed is not named: {hint}");
    }
}

#[tokio::test]
async fn changes_that_take_no_protection_away_do_not_end_a_command() {
    let workspace = Workspace::with(&[".git/config", ".git/hooks/x", ".envrc", "file"]);
    let text = "echo ready; read -r line < go; echo survived";
    rustix::fs::mkfifoat(rustix::fs::CWD, workspace.path("go"), 0o666.into()).unwrap();
    let mut running = Running::start(in_workspace(text, workspace.0.path()), PLENTY);
    running.until_output("ready").await;
    workspace.write(".git/index.lock", "x");
    std::fs::rename(workspace.path(".git/index.lock"), workspace.path(".git/index")).unwrap();
    std::fs::rename(workspace.path("file"), workspace.path("moved")).unwrap();
    workspace.write(".git/hooks/y", "a hook of the owner");
    std::fs::write(workspace.path("go"), "on\n").unwrap();
    let ran = running.finish().await;
    assert!(ran.succeeded(), "{ran:?}");
    assert_eq!((ran.stdout.as_str(), ran.exit.hint), ("ready\nsurvived\n", None));
}

#[tokio::test]
async fn nothing_on_the_way_to_a_protected_name_can_be_moved_away() {
    let sub = ".git/modules/group/sub";
    let files = [
        ".git/HEAD",
        ".git/config",
        ".git/modules/group/sub/HEAD",
        ".git/modules/group/sub/config",
        ".git/modules/group/sub/hooks/post-checkout",
        ".git/worktrees/tree/HEAD",
        ".git/worktrees/tree/commondir",
        "vendor/r/.git/HEAD",
        "vendor/r/.git/config",
        "vendor/r/.git/hooks/pre-commit",
    ];
    let workspace = Workspace::with(&files);
    let text = format!(
        "for way in .git/modules .git/modules/group {sub} .git/worktrees .git/worktrees/tree \
             vendor vendor/r vendor/r/.git; do
             mv $way ${{way%/*}}/away 2>/dev/null || mv $way away && echo moved $way; done
         for file in {}; do case $file in */HEAD) ;; *) echo evil > $file ;; esac; done
         echo new > {sub}/index && echo new > vendor/r/.git/index && echo works",
        files.join(" ")
    );
    let ran = run(in_workspace(&text, workspace.0.path())).await;
    assert_eq!(ran.stdout, "works\n", "{ran:?}");
    for file in files.into_iter().filter(|file| !file.ends_with("HEAD")) {
        assert!(workspace.is_original(file), "{file} was changed");
    }
}

#[tokio::test]
async fn a_submodule_is_recognised_without_its_head() {
    let workspace = Workspace::with(&[".git/HEAD", ".git/modules/sub/config"]);
    let text = "echo evil > .git/modules/sub/config; echo x > .git/modules/sub/HEAD && echo works";
    let ran = run(in_workspace(text, workspace.0.path())).await;
    assert_eq!((ran.stdout.as_str(), ran.exit.hint), ("works\n", None));
    assert!(workspace.is_original(".git/modules/sub/config"));
}

#[tokio::test]
async fn what_protected_names_lead_to_is_protected_too() {
    let workspace = Workspace::with(&["env.real", "githooks/pre-commit", "shared/config"]);
    workspace.link("env.real", ".envrc");
    workspace.write(".real/HEAD", "original");
    workspace
        .write(".real/config", "[core]\n\thooksPath = husky/_\n[include]\npath=../shared/config");
    workspace.write("husky/_/pre-commit", "original");
    workspace.link(".real", ".git");
    workspace.link("../githooks", ".real/hooks");
    workspace.write("sub/.git", "gitdir: ../sub.git\n");
    for script in ["scripts/push", "scripts/tool"] {
        workspace.write(script, "original");
    }
    for directory in [".husky", ".claude/hooks"] {
        std::fs::create_dir_all(workspace.path(directory)).unwrap();
    }
    workspace.link("../scripts/push", ".husky/pre-push");
    workspace.link("../../scripts/tool", ".claude/hooks/tool");
    for file in ["sub.git/HEAD", "sub.git/config", "sub.git/hooks/h"] {
        workspace.write(file, "original");
    }
    let text = "for link in .envrc .git .real/hooks sub/.git; do
            rm -rf $link; mv $link away; ln -sfn /tmp $link; done 2>/dev/null
        for file in env.real .envrc githooks/pre-commit .git/hooks/pre-commit .git/config \
            .real/config shared/config husky/_/pre-commit sub.git/config sub.git/hooks/h \
            scripts/push scripts/tool; do
            echo evil > $file; rm -f $file; done 2>/dev/null
        for way in .real githooks shared husky husky/_ sub sub.git; do mv $way away; done 2>/dev/null
        echo new > .git/index && echo works";
    let ran = run(in_workspace(text, workspace.0.path())).await;
    assert_eq!(ran.stdout, "works\n", "{ran:?}");
    for (link, to) in [(".envrc", "env.real"), (".git", ".real"), (".real/hooks", "../githooks")] {
        let found = std::fs::read_link(workspace.path(link)).unwrap();
        assert_eq!(found, Path::new(to), "{link}");
    }
    for file in [
        "env.real",
        "githooks/pre-commit",
        "shared/config",
        "husky/_/pre-commit",
        "sub.git/config",
        "scripts/push",
        "scripts/tool",
    ] {
        assert!(workspace.is_original(file), "{file} was changed");
    }
    assert!(ran.exit.hint.is_none(), "{:?}", ran.exit.hint);
}

#[tokio::test]
async fn what_a_command_brings_is_named_beside_any_other_hint() {
    let workspace = Workspace::with(&[".git/HEAD", ".git/modules/old/HEAD"]);
    let text = "mkdir -p a/b/.git/hooks .git/modules/new/hooks .vscode; echo evil > .envrc
        echo evil > .git/modules/new/HEAD; echo evil > .git/config; ln -s /nowhere .mcp.json; exit 3";
    let ran = run(in_workspace(text, workspace.0.path())).await;
    assert_eq!((ran.exit.verdict, ran.exit.exit_code), (CommandVerdict::Exited, 3), "{ran:?}");
    let hint = ran.exit.hint.unwrap();
    for name in ["a/b/.git", ".git/modules/new", ".vscode", ".envrc", ".git/config", ".mcp.json"] {
        assert!(hint.contains(name), "{name} is not named: {hint}");
    }
    assert!(!hint.contains("modules/old"), "{hint}");
}

#[tokio::test]
async fn a_command_cannot_lock_a_workspace_by_making_many_repositories() {
    let workspace = Workspace::with(&[".git/HEAD", ".git/config"]);
    let make = "mkdir -p .git/modules/m{1..600}/hooks r{1..600}/.git
        for n in {1..600}; do echo x > .git/modules/m$n/HEAD; done; mkdir -p .git/worktrees/w{1..600}";
    let ran = run(in_workspace(make, workspace.0.path())).await;
    assert!(ran.succeeded(), "{ran:?}");
    let hint = ran.exit.hint.unwrap();
    assert!(hint.len() < 4096, "{} bytes of hint", hint.len());
    let text = "echo evil > .git/modules/m599/hooks/x; mv .git/modules away; echo works";
    let ran = run(in_workspace(text, workspace.0.path())).await;
    assert_eq!(ran.stdout, "works\n", "{ran:?}");
    assert!(!workspace.path(".git/modules/m599/hooks/x").exists());
    assert!(workspace.path(".git/modules/m1").exists());
}
