//! The agent as the tests start it.

fn main() -> std::process::ExitCode {
    cortex_agent::main_entry()
}
