//! The systemd units that the programs install: understood by systemd, and as closed as they can be.

use std::path::Path;
use std::process::Command;

use cortex_tests::process::{Outcome, run};

/// Units of the machine and of a user.
const UNITS: [(&str, &str); 6] = [
    ("cortex-hubd.service", include_str!("../../packaging/systemd/cortex-hubd.service")),
    ("cortex-hubd.socket", include_str!("../../packaging/systemd/cortex-hubd.socket")),
    ("cortex-hubd-http.socket", include_str!("../../packaging/systemd/cortex-hubd-http.socket")),
    ("cortex-agent.service", include_str!("../../packaging/systemd/cortex-agent.service")),
    ("user/cortex-hubd.service", include_str!("../../packaging/systemd/cortex-hubd.user.service")),
    (
        "user/cortex-agent.service",
        include_str!("../../packaging/systemd/cortex-agent.user.service"),
    ),
];

/// Exposure by `systemd-analyze security`, in tenths, that a unit may have at most. The agent builds
/// sandboxes for others: what would close its own unit further would take that from it (see the unit).
const MOST_EXPOSED: [(&str, u32); 2] = [("cortex-hubd.service", 15), ("cortex-agent.service", 94)];

fn analyze(folder: &Path, arguments: &[&str]) -> Option<Outcome> {
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        eprintln!("skipped: there is no systemd-analyze on this machine");
        return None;
    }
    let mut command = Command::new("systemd-analyze");
    command.args(arguments).current_dir(folder).env("XDG_RUNTIME_DIR", folder);
    Some(run(&mut command, b""))
}

/// The units as they are installed, for a program that exists.
fn installed() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("user")).unwrap();
    // A user's service wants its sockets beside it.
    let sockets =
        [("user/cortex-hubd.socket", UNITS[1].1), ("user/cortex-hubd-http.socket", UNITS[2].1)];
    for (name, text) in UNITS.into_iter().chain(sockets) {
        let text = text
            .replace("@PROGRAM@", "/bin/true")
            .replace("@STATE@", "/var/lib/cortex-agent")
            .replace("@LISTEN@", "127.0.0.1:7443");
        assert!(!text.contains('@') || text.contains("@system-service"), "{name}: {text}");
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    folder
}

#[test]
fn systemd_understands_every_line_of_the_units() {
    let folder = installed();
    for (name, _) in UNITS {
        let user: &[&str] = if name.starts_with("user/") { &["--user"] } else { &["--system"] };
        let unit = format!("./{}", name.trim_start_matches("user/"));
        let place = if name.starts_with("user/") {
            folder.path().join("user")
        } else {
            folder.path().into()
        };
        let arguments = [&["verify", "--man=no"], user, &[unit.as_str()]].concat();
        let Some(found) = analyze(&place, &arguments) else { return };
        assert_eq!(found.code, 0, "{name}: {}", found.stderr);
        // A line that it does not know is a warning only.
        let about_us = |line: &&str| line.contains("cortex-");
        assert_eq!(found.stderr.lines().find(about_us), None, "{name}");
    }
    // It would have said so.
    let broken = UNITS[0].1.replace("@PROGRAM@", "/bin/true").replace("UMask=", "UMsk=");
    std::fs::write(folder.path().join("cortex-hubd.service"), broken).unwrap();
    if let Some(found) = analyze(folder.path(), &["verify", "--man=no", "./cortex-hubd.service"]) {
        assert!(found.stderr.contains("UMsk"), "{}", found.stderr);
    }
}

/// What keeps a daemon from starting goes away by itself more often than not: a full disk, a certificate
/// whose key is just being written. By default systemd gives up after five attempts, for good.
#[test]
fn a_daemon_that_does_not_start_is_started_again_however_often() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/systemd");
    let mut services = 0;
    for unit in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if unit.extension().is_some_and(|extension| extension == "service") {
            let text = std::fs::read_to_string(&unit).unwrap();
            assert!(text.contains("\nStartLimitIntervalSec=0\n"), "{}", unit.display());
            assert!(text.contains("\nRestart=always\n"), "{}", unit.display());
            services += 1;
        }
    }
    assert_eq!(services, 4);
}

#[test]
fn the_units_are_no_more_exposed_than_they_have_to_be() {
    let folder = installed();
    for (unit, most) in MOST_EXPOSED {
        let threshold = format!("--threshold={most}");
        let path = format!("./{unit}");
        let arguments = ["security", "--offline=true", "--no-pager", &threshold, &path];
        let Some(found) = analyze(folder.path(), &arguments) else { return };
        assert_eq!(found.code, 0, "{unit}: {}", found.text().lines().last().unwrap_or_default());
    }
    let open = "[Service]\nExecStart=/bin/true\n";
    std::fs::write(folder.path().join("open.service"), open).unwrap();
    let arguments =
        ["security", "--offline=true", "--no-pager", "--threshold=15", "./open.service"];
    if let Some(found) = analyze(folder.path(), &arguments) {
        assert_ne!(found.code, 0, "a unit without any of it is told from ours");
    }
}
