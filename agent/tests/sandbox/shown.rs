//! What a node's owner shows to strict commands of the machine.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use cortex_agent::exec::{CommandRequest, CommandVerdict};
use cortex_agent::sandbox::exposed::check_name;

use crate::support::{run, script, succeeds_outside};

#[tokio::test]
async fn what_the_owner_shows_can_be_read_and_not_changed_and_nothing_beside_it() {
    // Not among temporary files, of which nothing is shown: commands have their own there.
    let places = [env!("CARGO_TARGET_TMPDIR"), "/srv", "/opt"].map(Path::new).into_iter();
    let mut places = places.filter(|place| check_name(place).is_ok());
    let Some(folder) = places.find_map(|place| tempfile::tempdir_in(place).ok()) else {
        eprintln!("skipped: this user has no place for files to show");
        return;
    };
    let root = folder.path().canonicalize().unwrap();
    std::fs::set_permissions(&root, PermissionsExt::from_mode(0o755)).unwrap();
    let (shown, secret) = (root.join("shown"), root.join("secret"));
    for (place, content) in [(&shown, "SHOWN"), (&secret, "CANARY")] {
        std::fs::create_dir(place).unwrap();
        // Everybody may write there: what keeps commands from it is the sandbox.
        std::fs::set_permissions(place, PermissionsExt::from_mode(0o777)).unwrap();
        std::fs::write(place.join("file"), content).unwrap();
        std::fs::set_permissions(place.join("file"), PermissionsExt::from_mode(0o666)).unwrap();
    }
    std::fs::write(shown.join("program"), "#!/bin/sh\necho ran\n").unwrap();
    std::fs::set_permissions(shown.join("program"), PermissionsExt::from_mode(0o755)).unwrap();
    let with = |text: &str| CommandRequest { read_only_paths: vec![shown.clone()], ..script(text) };
    let (at, beside) = (shown.display(), secret.display());
    let read = format!("cat {at}/file && {at}/program");
    assert!(!run(script(&read)).await.succeeded(), "it is seen without being shown");
    let ran = run(with(&read)).await;
    assert_eq!((ran.stdout.as_str(), ran.exit.exit_code), ("SHOWNran\n", 0), "{ran:?}");
    for (what, text) in [
        ("change a file", format!("echo x >> {at}/file")),
        ("make a file", format!("echo x > {at}/made && test -s {at}/made")),
        ("move a file", format!("mv {at}/made {at}/moved")),
        ("remove a file", format!("rm {at}/moved")),
        ("read what is beside it", format!("grep -q CANARY {beside}/file")),
        ("read it by a way back", format!("grep -q CANARY {at}/../secret/file")),
        ("change what is beside it", format!("echo x >> {beside}/file")),
    ] {
        // In this order each can be done outside.
        assert!(succeeds_outside(&text, &root), "{what}: the control fails");
    }
    std::fs::write(shown.join("file"), "SHOWN").unwrap();
    std::fs::write(secret.join("file"), "CANARY").unwrap();
    std::fs::write(shown.join("kept"), "").unwrap();
    for (what, text) in [
        ("change a file", format!("echo x >> {at}/file")),
        ("make a file", format!("touch {at}/made")),
        ("move a file", format!("mv {at}/kept {at}/moved")),
        ("remove a file", format!("rm -f {at}/kept")),
        ("change its rights", format!("chmod 0600 {at}/file")),
        ("make it writable", format!("mount -o remount,rw,bind {at}")),
        ("read what is beside it", format!("grep -q CANARY {beside}/file")),
        ("read it by a way back", format!("grep -q CANARY {at}/../secret/file")),
        ("see that there is something beside it", format!("test -e {beside}")),
    ] {
        let ran = run(with(&text)).await;
        assert!(ran.exit.verdict == CommandVerdict::Exited && !ran.succeeded(), "{what}: {ran:?}");
    }
    assert_eq!(std::fs::read(shown.join("file")).unwrap(), b"SHOWN");
    assert_eq!(std::fs::read(secret.join("file")).unwrap(), b"CANARY");
    assert!(shown.join("kept").exists() && !shown.join("made").exists());

    // One file alone, and something that is not there.
    let alone = |text: &str| CommandRequest {
        read_only_paths: vec![shown.join("file"), root.join("nowhere")],
        ..script(text)
    };
    let ran = run(alone(&format!("cat {at}/file; test ! -e {at}/program"))).await;
    assert_eq!((ran.stdout.as_str(), ran.exit.exit_code), ("SHOWN", 0), "{ran:?}");

    // What is exchanged for a link after it was checked is not followed: nothing runs. With one path more,
    // so that no sandbox made beforehand fits, which would still have the directory that was there.
    std::fs::remove_dir_all(&shown).unwrap();
    symlink(&secret, &shown).unwrap();
    let exchanged = CommandRequest {
        read_only_paths: vec![shown.clone(), root.join("elsewhere")],
        ..script(&format!("cat {at}/file; echo ran"))
    };
    let ran = run(exchanged).await;
    assert_ne!(ran.exit.verdict, CommandVerdict::Exited, "{ran:?}");
    assert_eq!(ran.stdout, "");
}
