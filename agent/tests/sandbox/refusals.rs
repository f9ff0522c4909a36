//! Commands that must not run, and have not.

use std::path::Path;

use cortex_agent::exec::{CommandEvent, CommandRequest, CommandVerdict, Executor};
use cortex_agent::sandbox::Launcher;
use cortex_shared::policy::Mode;
use tempfile::TempDir;

use crate::support::{apart, in_workspace, launcher, run, script, succeeds_outside, view};

#[tokio::test]
async fn a_refused_command_has_not_run() {
    let parent = TempDir::new().unwrap();
    let root = parent.path().join("workspace");
    let state = parent.path().join("state");
    for directory in [&root, &state, &root.join("sub")] {
        std::fs::create_dir(directory).unwrap();
    }
    std::os::unix::fs::symlink(&state, root.join("link")).unwrap();
    let marker = root.join("marker");
    let touch = "touch /workspace/marker marker";
    let at =
        |root: &Path, cwd: &str| CommandRequest { workspace: view(root, cwd), ..script(touch) };
    let ok = || in_workspace(touch, &root);
    let cases = [
        ("a missing working directory", at(&root, "nowhere")),
        ("a working directory outside", at(&root, "../state")),
        ("a working directory outside by a link", at(&root, "link")),
        ("an absolute working directory", at(&root, "/tmp")),
        ("a missing workspace", at(&parent.path().join("no"), "")),
        ("a file as workspace", at(Path::new("/etc/passwd"), "")),
        ("the root as workspace", at(Path::new("/"), "")),
        ("a home as workspace", at(Path::new("/root"), "")),
        ("all homes as workspace", at(Path::new("/home"), "")),
        ("the system as workspace", at(Path::new("/usr"), "")),
        ("a workspace that all commands would see", at(Path::new("/usr/share"), "")),
        (
            "a workspace around the agent's state",
            CommandRequest { forbidden_paths: vec![root.join("sub")], ..ok() },
        ),
        (
            "a workspace in the agent's state",
            CommandRequest { forbidden_paths: vec![parent.path().to_owned()], ..ok() },
        ),
        (
            "the agent's state seen read-only",
            CommandRequest {
                forbidden_paths: vec![state.join("x")],
                read_only_paths: vec![state.clone()],
                ..ok()
            },
        ),
        ("nothing to run", CommandRequest { script: None, ..ok() }),
        ("a program and a script", CommandRequest { argv: vec![b"true".to_vec()], ..ok() }),
        ("a zero byte", in_workspace("touch marker\0", &root)),
        ("an odd variable", CommandRequest { env: vec![(b"A=B".into(), b"c".into())], ..ok() }),
        (
            "a long argument",
            CommandRequest { script: None, argv: vec![vec![b'x'; 100_000]], ..ok() },
        ),
    ];
    for (what, request) in cases {
        let ran = run(request).await;
        assert_eq!(ran.exit.verdict, CommandVerdict::Refused, "{what}: {ran:?}");
        assert_eq!(ran.exit.exit_code, 126, "{what}");
        assert!(ran.exit.reason.is_some(), "{what} gives no reason");
        assert!(!marker.exists(), "{what}: the command has run");
    }
    assert!(run(ok()).await.succeeded());
    assert!(marker.exists(), "the marker does not work");
}

#[tokio::test]
async fn without_user_namespaces_strict_commands_are_refused_with_a_remedy() {
    // In an outer namespace, its owner may forbid further ones.
    let outer = ["-U", "--map-user=1000", "--map-group=1000", "--keep-caps"];
    if !succeeds_outside(&format!("unshare {} true", outer.join(" ")), Path::new("/")) {
        eprintln!("skipped: user namespaces are not available here, so they cannot be taken away");
        return;
    }
    let limit = "echo 0 > /proc/sys/user/max_user_namespaces && exec \"$@\"";
    let before = [&["unshare"], outer.as_slice(), &["sh", "-c", limit, "sh"]].concat();
    let (succeeded, text) = apart(&before, "refusals::apart_refused", &[]).await;
    assert!(succeeded && text.contains("refused as it should be"), "{text}");
}

#[tokio::test]
#[ignore = "run by the test above, without user namespaces"]
async fn apart_refused() {
    let workspace = TempDir::new().unwrap();
    let ran = run(in_workspace("touch marker", workspace.path())).await;
    assert_eq!(ran.exit.verdict, CommandVerdict::Refused, "{ran:?}");
    assert!(ran.exit.hint.as_ref().unwrap().contains("max_user_namespaces"), "{ran:?}");
    assert!(!workspace.path().join("marker").exists(), "the command has run");
    let found = launcher().probe(&[], false).await;
    assert!(!found.strict_available() && !found.user_namespaces, "{found:?}");
    assert_eq!(Some(&found.missing[0].remedy), ran.exit.hint.as_ref());
    eprintln!("refused as it should be");
}

#[tokio::test]
async fn the_probe_agrees_with_what_commands_experience() {
    let found = launcher().probe(&[], false).await;
    let ran = run(script("true")).await;
    assert_eq!(found.strict_available(), ran.succeeded(), "{found:?} {ran:?}");
    assert_eq!(found.root, rustix::process::geteuid().is_root());
    if !found.strict_available() {
        eprintln!("skipped: strict mode is not available here: {:?}", found.missing);
    }
}

#[tokio::test]
async fn a_probe_says_that_a_required_control_group_is_missing() {
    let without = Launcher::with_stage(env!("CARGO_BIN_EXE_cortex-agent"));
    let groups = without.control_groups();
    let found = without.probe(&[], true).await;
    assert_eq!(found.strict_available(), groups != "none", "{groups}: {found:?}");
    if groups == "none" {
        assert_eq!(found.missing[0].what, "control group");
        assert!(found.missing[0].remedy.contains("require_cgroup"));
    }
    assert!(without.probe(&[], false).await.strict_available());
}

#[tokio::test]
async fn what_has_started_is_never_called_refused() {
    // A stage that says that it refuses what it has started before.
    let folder = TempDir::new().unwrap();
    let stage = folder.path().join("stage");
    let refusal = r#"{"Refused":{"step":"Internal","errno":22,"detail":"wait for events"}}"#;
    let text = format!(
        "#!/usr/bin/perl\nopen(my $s, '+<&=0'); recv($s, my $spec, 65536, 0);\n\
         foreach (q(\"Started\"), q({refusal})) {{ send($s, $_, 0) }}\n"
    );
    std::fs::write(&stage, text).unwrap();
    std::fs::set_permissions(&stage, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let executor = Executor::new(Launcher::with_stage(&stage));
    let (_control, orders) = tokio::sync::mpsc::channel(1);
    let (sender, mut events) = tokio::sync::mpsc::channel(4);
    let request = CommandRequest { mode: Mode::Permissive, ..script("true") };
    executor.run(request, 1, orders, sender).await;
    let mut seen = Vec::new();
    while let Some(event) = events.recv().await {
        seen.push(event);
    }
    let [CommandEvent::Started { .. }, CommandEvent::Exit(exit)] = &seen[..] else {
        panic!("{seen:?}")
    };
    assert_eq!((exit.verdict, exit.exit_code), (CommandVerdict::Failed, 125), "{exit:?}");
    assert!(exit.reason.as_ref().unwrap().contains("wait for events"), "{exit:?}");
}
