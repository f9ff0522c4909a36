//! Shells and terminals, driven by a real terminal on the operator's side.

use std::time::{Duration, Instant};

use cortex_tests::is_root;
use cortex_tests::mesh::{As, Mesh, Operator};
use cortex_tests::proxy::{Fault, Proxy};
use cortex_tests::terminal::Terminal;
use cortex_tests::wait::until;
use rustix::process::Signal;

fn users() -> Vec<As> {
    if is_root() { vec![As::Me, As::Unprivileged] } else { vec![As::Me] }
}

/// A shell with a prompt that counts.
fn shell(operator: &Operator, node: &str) -> Terminal {
    let mut terminal = Terminal::start(&operator.command(&["shell", node]));
    // The prompt: bash turns on bracketed paste, or shows what it is given.
    terminal.until("$ ");
    terminal.keys("PS1='<\\#>'\r");
    terminal.until("<2>");
    terminal
}

#[test]
fn a_shell_has_a_prompt_a_size_and_job_control_and_ends_with_its_own_code() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    for (index, user) in users().into_iter().enumerate() {
        let name = format!("n{index}");
        let _node = mesh.node(&name, user);
        let mut terminal = shell(&operator, &name);
        terminal.keys("stty size; echo $TERM; tty\r");
        terminal.until("24 80\r\nxterm-256color\r\n/dev/pts/0\r\n");
        terminal.resize(50, 132);
        terminal.press_until("stty size\r", "50 132");
        terminal.keys("sleep 300; echo not rea''ched\r");
        terminal.until("sleep 300;");
        terminal.press_until("\x03", "^C\r\n");
        terminal.press_until("echo st''atus $?\r", "status 130");
        terminal.keys("sleep 301\r");
        terminal.until("sleep 301");
        terminal.press_until("\x1a", "Stopped");
        terminal.keys("jo''bs -l; bg; kill %1; wait; echo sto''pped none\r");
        terminal.until("stopped none");
        terminal.keys("exit 7\r");
        assert_eq!(terminal.wait().code(), Some(7), "{}", terminal.shown());
    }
}

#[test]
fn bytes_of_full_screen_programs_pass_as_they_are() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let _node = mesh.node("a", As::Me);
    let script = "stty raw -echo; echo ready; head -c 12 | od -An -tx1; stty sane; echo done";
    let mut terminal = Terminal::start(&operator.command(&["exec", "a", "-t", "-s", script]));
    terminal.until("ready");
    terminal.bytes(b"\x1b[A\x00\xff\x03\x1a\x11\x13\x1c~.");
    terminal.until("1b 5b 41 00 ff 03 1a 11 13 1c 7e 2e");
    assert_eq!(terminal.wait().code(), Some(0));
}

#[test]
fn the_terminal_has_its_settings_again_however_it_ends() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let mut node = mesh.node("a", As::Me);
    type Ending = fn(&mut Terminal, &mut Mesh, &mut cortex_tests::mesh::Node);
    let endings: [(&str, Ending, Option<i32>); 10] = [
        ("its own end", |terminal, _, _| terminal.keys("exit 3\r"), Some(3)),
        ("leaving", |terminal, _, _| terminal.keys("\r~."), Some(130)),
        ("SIGTERM", |terminal, _, _| terminal.signal(Signal::TERM), Some(130)),
        ("SIGHUP", |terminal, _, _| terminal.signal(Signal::HUP), Some(130)),
        ("SIGQUIT", |terminal, _, _| terminal.signal(Signal::QUIT), Some(130)),
        ("SIGUSR1", |terminal, _, _| terminal.signal(Signal::USR1), Some(130)),
        ("SIGUSR2", |terminal, _, _| terminal.signal(Signal::USR2), Some(130)),
        ("SIGALRM", |terminal, _, _| terminal.signal(Signal::ALARM), Some(130)),
        ("the node's death", |_, _, node| node.kill(), Some(125)),
        ("the hub's death", |_, mesh, _| mesh.kill_hub(), Some(125)),
    ];
    for (what, end, code) in endings {
        // A flag by which the settings of before are known from any others.
        let mut terminal = Terminal::start(&operator.command(&["node", "list"]));
        assert!(terminal.wait().success());
        let fresh = format!("{:?}", terminal.settings());
        let mut terminal = shell(&operator, "a");
        assert_ne!(format!("{:?}", terminal.settings()), fresh, "raw while it runs");
        end(&mut terminal, &mut mesh, &mut node);
        assert_eq!(terminal.wait().code(), code, "{what}: {}", terminal.shown());
        assert_eq!(format!("{:?}", terminal.settings()), fresh, "{what}");
        if what == "the node's death" {
            node.run();
            mesh.wait_online("a");
        }
    }
}

#[test]
fn leaving_works_while_the_command_takes_no_keys_and_ends_it() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let _node = mesh.node("a", As::Me);
    let mark = format!("cortex-mark-{}", rand::random::<u64>());
    let script = format!("stty raw -echo; echo ready; exec -a {mark} sleep 300");
    let mut terminal = Terminal::start(&operator.command(&["exec", "a", "-t", "-s", &script]));
    terminal.until("ready");
    terminal.keys("~?");
    terminal.until("Escapes");
    // More than waits for a command, and than the command's terminal takes.
    let paste = "x".repeat(20_000_000);
    terminal.keys(&paste);
    terminal.keys("\r~.");
    assert_eq!(terminal.wait().code(), Some(130));
    let still_there = || super::exec::runs(&mark);
    cortex_tests::wait::until("the command is gone", || !still_there());
}

/// Numbered lines from a shell, a cut in the middle, and what is typed and resized meanwhile.
fn survives(terminal: &mut Terminal, what: &str, cut: impl FnOnce(), heal: impl FnOnce()) {
    let mark = rand::random::<u32>();
    terminal.keys(&format!(
        "for i in $(seq 400); do echo line{mark}-$i-; sleep 0.01; done; echo en''d{mark}\r"
    ));
    terminal.until(&format!("line{mark}-100-"));
    let notes = || terminal.shown().matches("note: ").count();
    let before = notes();
    cut();
    cortex_tests::wait::until("the cut is noticed", || notes() > before);
    // While nobody hears it.
    terminal.resize(33, 111);
    terminal.keys(&format!("stty si''ze; echo ty''ped{mark}\r"));
    heal();
    terminal.until(&format!("33 111\r\ntyped{mark}"));
    // What this side said itself may stand in the middle of a line.
    let shown = terminal.shown();
    let mut shown = shown.split("\rnote: ");
    let mut output = shown.next().unwrap_or_default().to_owned();
    output.extend(shown.filter_map(|piece| Some(piece.split_once("\r\n")?.1)));
    let shown = output;
    for i in 1..=400 {
        let line = format!("line{mark}-{i}-");
        assert_eq!(shown.matches(&line).count(), 1, "{what}: {line} in {shown:?}");
    }
    assert!(shown.contains(&format!("end{mark}")), "{what}");
    terminal.resize(24, 80);
    terminal.press_until("stty size\r", "24 80");
}

#[test]
fn a_shell_goes_on_over_a_cut_line_and_a_killed_hub_without_losing_a_byte_or_a_resize() {
    let mut mesh = Mesh::start();
    let hub = mesh.address().parse().unwrap();
    let (nodes_line, operators_line) = (Proxy::start(hub), Proxy::start(hub));
    let operator = mesh.operator_through("operator", &operators_line.address().to_string());
    let _node = mesh.node_through("a", &nodes_line.address().to_string());
    let fresh = {
        let mut terminal = Terminal::start(&operator.command(&["node", "list"]));
        assert!(terminal.wait().success());
        format!("{:?}", terminal.settings())
    };
    let mut terminal = shell(&operator, "a");
    for (what, line) in [("the node's line", &nodes_line), ("the operator's", &operators_line)] {
        let cut = || {
            line.set(Fault::Refuse);
            line.cut();
        };
        survives(&mut terminal, what, cut, || line.set(Fault::None));
    }
    let mesh = std::cell::RefCell::new(mesh);
    let (kill, start) = (|| mesh.borrow_mut().kill_hub(), || mesh.borrow_mut().start_hub());
    survives(&mut terminal, "the hub", kill, start);
    terminal.keys("exit 5\r");
    assert_eq!(terminal.wait().code(), Some(5), "{}", terminal.shown());
    assert_eq!(format!("{:?}", terminal.settings()), fresh);
}

#[test]
fn a_shell_without_a_terminal_is_a_clear_error_and_exec_has_one_anyway() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let _node = mesh.node("a", As::Me);
    let outcome = operator.agent(&["shell", "a"]);
    assert_eq!(outcome.code, 2);
    assert!(outcome.stderr.contains("needs a terminal"), "{}", outcome.stderr);
    let outcome = operator.agent(&["exec", "a", "-t", "-s", "tty; stty size; echo err >&2"]);
    assert_eq!(outcome.text(), "/dev/pts/0\r\n24 80\r\nerr\r\n", "{}", outcome.stderr);
}

#[test]
fn a_permissive_shell_has_a_terminal_of_the_host() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("admin");
    let node = mesh.node("a", As::Me);
    let allow = ["policy", "set", "a", "permissive", "--reason", "test"];
    let _allowed = operator.agent(&allow).ok();
    let _raised = node.agent(&["ceiling", "set", "permissive"]).ok();
    let allowed = ["exec", "a", "--mode", "permissive", "--", "true"];
    until("the ceiling is known at the hub", || operator.agent(&allowed).code == 0);
    let command = operator.command(&["shell", "a", "--mode", "permissive"]);
    let mut terminal = Terminal::start(&command);
    // The prompt is whatever the user's own files make it.
    terminal.press_until("stty si''ze; PS1='<\\#>'\r", "24 80");
    terminal.keys(&format!("te''st -e {} && echo out''side\r", mesh.path("hub").display()));
    terminal.until("outside");
    terminal.keys("sleep 300\r");
    terminal.until("sleep 300");
    terminal.press_until("\x03", "^C");
    terminal.press_until("exit 4\r", "exit 4");
    assert_eq!(terminal.wait().code(), Some(4), "{}", terminal.shown());
}

/// A window of a tmux server of its own, ended on drop.
struct Tmux {
    socket: std::path::PathBuf,
}

impl Tmux {
    fn run(&self, arguments: &[&str]) -> String {
        let mut command = std::process::Command::new("tmux");
        command.arg("-f/dev/null").arg("-S").arg(&self.socket).args(arguments);
        let done = command.env_remove("TMUX").output().unwrap();
        String::from_utf8_lossy(&done.stdout).into_owned()
    }

    fn press_until(&self, keys: &[&str], text: &str) {
        cortex_tests::wait::until(text, || {
            self.run(&[&["send-keys"], keys].concat());
            let until = Instant::now() + Duration::from_millis(300);
            while Instant::now() < until {
                if self.run(&["capture-pane", "-p"]).contains(text) {
                    return true;
                }
                std::thread::park_timeout(Duration::from_millis(20));
            }
            false
        });
    }

    fn until(&self, text: &str) {
        cortex_tests::wait::until(text, || self.run(&["capture-pane", "-p"]).contains(text));
    }
}

impl Drop for Tmux {
    fn drop(&mut self) {
        self.run(&["kill-server"]);
    }
}

#[test]
fn an_editor_works_in_a_real_terminal_program_and_the_terminal_is_sane_afterwards() {
    for program in ["tmux", "vi"] {
        // Without them nothing would be tested here, which must not look like success.
        let look = format!("command -v {program}");
        let there = std::process::Command::new("sh").args(["-c", &look]).output();
        assert!(
            there.is_ok_and(|found| found.status.success()),
            "install {program}: scripts/setup tmux vi"
        );
    }
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let _node = mesh.node("a", As::Me);
    let tmux = Tmux { socket: mesh.path("tmux") };
    let command = operator.command(&["shell", "a"]);
    let variables = command.get_envs().filter_map(|(name, value)| Some((name, value?)));
    let variables: String = variables
        .map(|(name, value)| format!("{}='{}' ", name.display(), value.display()))
        .collect();
    let shell = command.get_program().display();
    // Settings before and after are compared in the window itself.
    let script = format!(
        "before=$(stty -g); env {variables} {shell} shell a; echo code $?; \
         test \"$before\" = \"$(stty -g)\" && echo sane; sleep 300"
    );
    tmux.run(&[
        "new-session",
        "-d",
        "-x",
        "100",
        "-y",
        "30",
        &format!("bash -c '{}'", script.replace('\'', "'\\''")),
    ]);
    tmux.until("cortex@cortex:");
    tmux.run(&["send-keys", "vi -u NONE file", "Enter"]);
    tmux.until("[New");
    tmux.run(&["send-keys", "i", "typed in vi", "Escape", ":set columns? lines?", "Enter"]);
    tmux.until("columns=100");
    tmux.run(&["resize-window", "-x", "120", "-y", "40"]);
    // The size takes another way than the keys, and may come later.
    tmux.press_until(&["Escape", ":set columns? lines?", "Enter"], "columns=120");
    tmux.run(&["send-keys", "Enter", ":wq", "Enter"]);
    // What is typed while vi gives the terminal back is lost: first the prompt again.
    tmux.until("NONE file\ncortex@cortex:");
    tmux.run(&["send-keys", "clear; cat fi''le; exit 9", "Enter"]);
    tmux.until("typed in vi");
    tmux.until("code 9");
    tmux.until("sane");
}
