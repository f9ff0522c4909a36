//! The hub as the tests start it.

fn main() -> std::process::ExitCode {
    cortex_hubd::main_entry()
}
