//! `cortex-agent`: see the library.

fn main() -> std::process::ExitCode {
    cortex_agent::main_entry()
}
