//! `cortex-hubd`: see the library.

fn main() -> std::process::ExitCode {
    cortex_hubd::main_entry()
}
