//! `cortex-hubd`: see the library.

#[global_allocator]
static ALLOCATOR: zeroizing_alloc::ZeroAlloc<std::alloc::System> = cortex_hubd::ALLOCATOR;

fn main() -> std::process::ExitCode {
    cortex_hubd::main_entry()
}
