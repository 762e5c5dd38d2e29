//! The `foresee` program.

use std::process::ExitCode;

// The proxy makes many small allocations on one thread and frees them on another.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    foresee_cli::run()
}
