//! The sandbox and the running of commands, against the real kernel: as the user who runs the
//! tests and, if that is root, once more as an unprivileged one.
//!
//! Every denied act is first done outside, where it must succeed; afterwards its effect is looked
//! for, not only its exit code.

#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod abuse;
mod calls;
mod denials;
mod endings;
mod input;
mod library;
mod output;
mod protected;
mod refusals;
mod shown;
mod start;
mod support;
mod systems;
mod terminal;
mod usability;

use std::os::unix::process::CommandExt as _;

#[test]
fn all_of_this_holds_for_an_unprivileged_user_too() {
    if rustix::process::geteuid().as_raw() != 0 {
        eprintln!("skipped: already an unprivileged user");
        return;
    }
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--skip", "all_of_this_holds", "--nocapture"]);
    command.env("HOME", "/nonexistent").uid(65534).gid(65534).current_dir("/");
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    for line in text.lines().filter(|line| line.starts_with("skipped:")) {
        eprintln!("as an unprivileged user: {line}");
    }
    assert!(output.status.success(), "as an unprivileged user:\n{text}");
}
