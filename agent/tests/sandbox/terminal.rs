//! Commands with a terminal: what it is, what it does, and that it opens no way out.

use bytes::Bytes;
use cortex_agent::exec::{
    CancelCause, CommandControl, CommandRequest, CommandVerdict, OutputStream, TerminalRequest,
};
use cortex_agent::sandbox::TerminalSize;
use cortex_shared::policy::Mode;

use crate::support::{PLENTY, Running, holds, in_workspace, program, script, succeeds_outside};

fn with_terminal(request: CommandRequest) -> CommandRequest {
    let size = TerminalSize { rows: 24, columns: 80 };
    let terminal = TerminalRequest { size, kind: "xterm".to_owned() };
    CommandRequest { terminal: Some(terminal), ..request }
}

fn modes(text: &str) -> [CommandRequest; 2] {
    let strict = with_terminal(script(text));
    [CommandRequest { mode: Mode::Permissive, ..strict.clone() }, strict]
}

async fn typed(running: &Running, keys: impl Into<Bytes>) {
    let data = keys.into();
    running.order(CommandControl::Stdin { data, end: false }).await;
}

#[tokio::test]
async fn a_command_has_a_controlling_terminal_of_the_size_and_kind_asked_for() {
    for request in modes(
        "tty; stty size; echo $TERM; test -t 0 && test -t 1 && test -t 2 && echo all three; \
         echo to the error output >&2; echo by name > /dev/tty; ps -o tty= -p $$ | tr -d ' '",
    ) {
        let mode = request.mode;
        let done = Running::start(request, PLENTY).finish().await;
        let lines: Vec<&str> = done.stdout.lines().collect();
        assert!(done.succeeded(), "{mode}: {done:?}");
        assert!(lines[0].starts_with("/dev/pts/"), "{lines:?}");
        let rest = ["24 80", "xterm", "all three", "to the error output", "by name"];
        assert_eq!(lines[1..6], rest, "{mode}");
        assert_eq!(format!("/dev/{}", lines[6]), lines[0]);
        assert!(done.stderr.is_empty());
        if mode == Mode::Strict {
            assert_eq!(lines[0], "/dev/pts/0", "the first of a devpts of its own");
        }
    }
}

#[tokio::test]
async fn a_new_size_is_told_to_the_command() {
    for request in modes("trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.01; done") {
        let mut running = Running::start(request, PLENTY);
        running.until_output("ready").await;
        let size = TerminalSize { rows: 50, columns: 132 };
        running.order(CommandControl::Resize(size)).await;
        running.until_output("50 132").await;
        assert!(running.finish().await.succeeded());
    }
}

#[tokio::test]
async fn ctrl_c_interrupts_and_ctrl_z_stops_and_the_shell_controls_its_jobs() {
    for request in [with_terminal(program(&["bash", "--norc", "-i"]))]
        .into_iter()
        .flat_map(|request| [CommandRequest { mode: Mode::Permissive, ..request.clone() }, request])
    {
        let mut running = Running::start(request, PLENTY);
        typed(&running, format!("{WATCH_THE_FOREGROUND}\r")).await;
        typed(&running, "PS1='<\\#>'\r").await;
        running.until_output("<3>").await;
        typed(&running, "bash -c \"$watch\" first\r").await;
        running.until_output("first 1: yes").await;
        typed(&running, "\x03").await;
        running.until_output("<4>").await;
        typed(&running, "echo st''atus $?\r").await;
        running.until_output("status 130").await;
        typed(&running, "bash -c \"$watch\" second\r").await;
        running.until_output("second 1: yes").await;
        typed(&running, "\x1a").await;
        running.until_output("Stopped").await;
        running.until_output("<6>").await;
        typed(&running, "bg %1\r").await;
        running.until_output("second 2: no").await;
        typed(&running, "jobs -r; fg\r").await;
        running.until_output("Running").await;
        running.until_output("second 3: yes").await;
        typed(&running, "\x03").await;
        running.until_output("<8>").await;
        typed(&running, "exit 7\r").await;
        let done = running.finish().await;
        assert_eq!(done.exit.exit_code, 7, "{}", done.stdout);
    }
}

/// A program that says when it comes to the foreground of its terminal or leaves it: a key pressed
/// before would reach the shell. It starts no process, because bash takes an interrupt that its
/// child survives for the child's own business.
const WATCH_THE_FOREGROUND: &str = r#"watch='while :; do
    read -r _ _ _ _ group _ _ front _ < /proc/$$/stat
    [ $group = $front ] && now=yes || now=no
    [ "$now" = "$was" ] || echo "$0 $((n += 1)): $now"
    was=$now
done'"#;

#[tokio::test]
async fn raw_bytes_pass_both_ways() {
    let all: Vec<u8> = (0..=255).collect();
    let text = "stty raw -echo; echo ready; head -c 256 | od -An -v -tu1 -w256; printf '\\377\\0'";
    for request in modes(text) {
        let mut running = Running::start(request, PLENTY);
        running.until_output("ready").await;
        let data = Bytes::from(all.clone());
        running.order(CommandControl::Stdin { data, end: false }).await;
        while running.next().await.is_some() {}
        let (output, end) = running.stdout.split_at(running.stdout.len() - 2);
        assert_eq!(end, [0xff, 0]);
        let output = String::from_utf8_lossy(output);
        let seen: Vec<u8> =
            output.split_whitespace().filter_map(|number| number.parse().ok()).collect();
        assert_eq!(seen, all);
    }
}

#[tokio::test]
async fn all_output_of_a_terminal_arrives_and_its_end_of_input_is_understood() {
    for request in modes("stty -onlcr -echo; seq 1 100000; cat; printf end") {
        let running = Running::start(request, PLENTY);
        let data = Bytes::from_static(b"typed\n");
        running.order(CommandControl::Stdin { data, end: true }).await;
        let done = running.finish().await;
        let numbers: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
        let from = done.stdout.find("1\n2\n").expect("the numbers came");
        assert_eq!(done.stdout[from..], format!("{numbers}typed\nend"));
        assert!(done.succeeded());
    }
}

#[tokio::test]
async fn a_slow_reader_slows_the_command_and_ctrl_c_still_arrives() {
    let folder = tempfile::tempdir().unwrap();
    // The shell goes on once `yes` is over, and says so where no credit is needed.
    let text = "trap 'touch interrupted; trap - INT; kill -INT $$' INT; yes; echo never";
    let request = with_terminal(in_workspace(text, folder.path()));
    let mut running = Running::start(request, 64 * 1024);
    while running.stdout.len() < 64 * 1024 {
        running.next().await.unwrap();
    }
    typed(&running, "\x03").await;
    assert!(holds(|| folder.path().join("interrupted").exists()).await);
    running.order(CommandControl::Credit(PLENTY)).await;
    let done = running.finish().await;
    assert_eq!(done.exit.verdict, CommandVerdict::Signalled);
    assert_eq!(done.exit.signal, Some(2));
    assert!(done.stdout.len() < 64 * 1024 + 256 * 1024, "{}", done.stdout.len());
    assert!(!done.stdout.contains("never"));
}

#[tokio::test]
async fn cancelling_hangs_up_a_shell_that_ignores_the_request_to_terminate() {
    for request in modes("trap '' TERM; echo ready; while :; do sleep 1; done") {
        let mut running = Running::start(request, PLENTY);
        running.until_output("ready").await;
        let grace = std::time::Duration::from_secs(60);
        running
            .order(CommandControl::Cancel { signal: 0, grace, cause: CancelCause::Requested })
            .await;
        let done = running.finish().await;
        assert_eq!(done.exit.verdict, CommandVerdict::Cancelled);
        assert_eq!(done.exit.signal, Some(1), "by the hangup, not by KILL after the grace");
    }
}

#[tokio::test]
async fn a_terminal_that_is_closed_and_opened_again_goes_on() {
    let text = "exec 3>&1- 4>&2- 0<&-; t=/proc/self/fd/3; exec 1>/dev/null 2>/dev/null; \
                exec 3>&- 4>&-; sleep 0.3; exec >/dev/tty; echo back";
    let done = Running::start(with_terminal(script(text)), PLENTY).finish().await;
    assert_eq!(done.stdout, "back\r\n", "{done:?}");
}

#[tokio::test]
async fn a_terminal_opens_no_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let tiocsti = "import fcntl,sys\ntry:\n fcntl.ioctl(0,0x5412,b'x')\n print('typed')\n\
                   except OSError as e:\n print('errno',e.errno)";
    let with_high_bits = "import ctypes\nl=ctypes.CDLL(None,use_errno=True)\n\
                   l.ioctl.argtypes=[ctypes.c_int,ctypes.c_ulong,ctypes.c_char_p]\n\
                   r=l.ioctl(0,0x100005412,b'x')\nprint('typed' if r==0 else 'errno %d'%ctypes.get_errno())";
    let strict = |text: &str| with_terminal(in_workspace(text, folder.path()));
    for probe in [tiocsti, with_high_bits] {
        let quoted = format!("python3 -c \"{probe}\"");
        // The kernel at hand does it where no filter is: the permissive twin.
        let permissive = CommandRequest { mode: Mode::Permissive, ..strict(&quoted) };
        let outside = Running::start(permissive, PLENTY).finish().await;
        if !outside.stdout.contains("typed") {
            eprintln!("skipped: this kernel lets nobody type into terminals: {}", outside.stdout);
            continue;
        }
        let inside = Running::start(strict(&quoted), PLENTY).finish().await;
        assert!(inside.stdout.contains("errno 1"), "{}", inside.stdout);
    }
    // The host's terminals are not there, and the agent's side of its own is nowhere inside.
    assert!(succeeds_outside("test -e /dev/pts/ptmx", folder.path()));
    let done = Running::start(
        strict(
            "ls /dev/pts; ls -l /proc/1/fd /proc/*/fd 2>/dev/null | grep -c ptmx; \
             ls -l /proc/self/fd | grep -c 'pts/0'; test -e /dev/console || echo no console",
        ),
        PLENTY,
    )
    .finish()
    .await;
    let lines: Vec<&str> = done.stdout.lines().collect();
    let found = lines[0].split_whitespace().collect::<Vec<_>>();
    assert_eq!(found, ["0", "ptmx"], "{}", done.stdout);
    assert_eq!(lines[1], "0", "no process inside has the other side: {}", done.stdout);
    assert!(lines[2].parse::<u32>().unwrap() >= 2, "{}", done.stdout);
    assert_eq!(lines[3], "no console");
}

#[tokio::test]
async fn output_of_a_terminal_is_one_stream() {
    let mut running = Running::start(with_terminal(script("echo a; echo b >&2; echo c")), PLENTY);
    let mut streams = Vec::new();
    while let Some(event) = running.next().await {
        if let cortex_agent::exec::CommandEvent::Output { stream, .. } = event {
            streams.push(stream);
        }
    }
    assert!(!streams.is_empty() && streams.iter().all(|stream| *stream == OutputStream::Stdout));
    assert_eq!(running.stdout, b"a\r\nb\r\nc\r\n");
}
