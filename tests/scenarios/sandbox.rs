//! What a command in a workspace can reach, seen from outside through the whole mesh.

use std::os::unix::fs::PermissionsExt as _;

use cortex_tests::is_root;
use cortex_tests::mesh::{As, Mesh};
use cortex_tests::process::Outcome;

#[test]
fn a_command_sees_its_workspace_and_nothing_of_its_users_home() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let _made: Outcome = operator.agent(&["workspace", "create", "w"]).ok();
    let users = if is_root() { vec![As::Me, As::Unprivileged] } else { vec![As::Me] };
    for (index, user) in users.into_iter().enumerate() {
        let name = format!("n{index}");
        let node = mesh.node(&name, user);
        let secret = node.home().join("secret");
        std::fs::write(&secret, "a secret of the user").unwrap();
        std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o644)).unwrap();
        let secret = secret.to_str().unwrap();
        let _attached: Outcome =
            operator.agent(&["workspace", "attach", "w", "--node", &name]).ok();
        let synced = ["workspace", "status", "w", "--watch"];
        let _synced: Outcome = operator.agent(&synced).ok();

        // Outside the sandbox the same act succeeds.
        let outside = std::process::Command::new("cat").arg(secret).output().unwrap();
        assert_eq!(outside.stdout, b"a secret of the user");
        let inside =
            |script: &str| operator.agent(&["exec", &name, "--workspace", "w", "-s", script]);
        let outcome = inside(&format!("cat {secret}"));
        assert_ne!(outcome.code, 0);
        assert!(!outcome.text().contains("a secret"), "{}", outcome.text());

        let state = node.home().join("state");
        assert_ne!(inside(&format!("ls {}", state.display())).code, 0, "nothing of the agent");
        let written = inside("echo from inside > made; cat made");
        assert_eq!(written.text(), "from inside\n", "{}", written.stderr);
        let made = node.workspace("w").join("made");
        assert_eq!(std::fs::read_to_string(&made).unwrap(), "from inside\n");
        let owner = |path| std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(path).unwrap());
        assert_eq!(owner(made), owner(node.workspace("w")), "the workspace's owner owns it");

        let facts = inside("cat /proc/self/status").ok().text();
        let fact = |key: &str| {
            let line = facts.lines().find(|line| line.starts_with(key)).unwrap();
            line.split_whitespace().nth(1).unwrap().to_owned()
        };
        assert_eq!(fact("NoNewPrivs:"), "1");
        assert_eq!(fact("Seccomp:"), "2");
        assert_eq!(fact("CapEff:"), "0000000000000000");
        assert_eq!(fact("CapBnd:"), "0000000000000000");
        assert_ne!(fact("Uid:"), "0", "never root");
    }
}

#[test]
fn what_a_command_left_for_programs_outside_is_said_to_the_person_who_ran_it() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let _made: Outcome = operator.agent(&["workspace", "create", "w"]).ok();
    let _node = mesh.node("n", As::Me);
    let _attached: Outcome = operator.agent(&["workspace", "attach", "w", "--node", "n"]).ok();
    let _synced: Outcome = operator.agent(&["workspace", "status", "w", "--watch"]).ok();
    for (name, code) in [(".envrc", 0), (".profile", 3)] {
        let script = format!("echo evil > {name}; exit {code}");
        let said = operator.agent(&["exec", "n", "--workspace", "w", "-s", &script]);
        assert_eq!(said.code, code, "{}", said.stderr);
        assert!(said.stderr.contains("hint: while it ran"), "{}", said.stderr);
        assert!(said.stderr.contains(name), "{}", said.stderr);
    }
}
