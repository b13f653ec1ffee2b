//! The reference VMM program.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmferry_refvm::cli::main()
}
