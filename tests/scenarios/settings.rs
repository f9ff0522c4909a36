//! The settings of the hub: which of the places where one can be said counts.

use cortex_tests::process::run;
use cortex_tests::program;

/// What `check` says is logged, by these arguments and variables.
fn logged(arguments: &[&str], variables: &[(&str, &str)]) -> String {
    let mut command = std::process::Command::new(program("hubd-under-test"));
    command.arg("check").args(arguments).env_remove("CORTEX_LOG").env_remove("CORTEX_HUB_LOG");
    command.envs(variables.iter().copied());
    let text = run(&mut command, b"").ok().text();
    let line = text.lines().find_map(|line| line.trim_start_matches("# ").strip_prefix("log = "));
    line.unwrap_or_else(|| panic!("{text}")).to_owned()
}

#[test]
fn what_is_logged_is_said_by_the_flag_before_cortex_log_and_by_that_before_the_rest() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("hubd.toml");
    std::fs::write(&file, "log = \"error\"").unwrap();
    let file = ["--config", file.to_str().unwrap()];
    let flag = [&file[..], &["--log", "trace"]].concat();
    let (cortex, hub) = (("CORTEX_LOG", "debug"), ("CORTEX_HUB_LOG", "warn"));
    assert_eq!(logged(&[], &[]), "\"info\"");
    assert_eq!(logged(&file, &[]), "\"error\"");
    assert_eq!(logged(&file, &[hub]), "\"warn\"");
    assert_eq!(logged(&file, &[hub, cortex]), "\"debug\"");
    assert_eq!(logged(&flag, &[hub, cortex]), "\"trace\"");
}
