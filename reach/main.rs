//! The program that steps into a VMM.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmferry_reach::program::run()
}
