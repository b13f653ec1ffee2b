//! The same guest for a PC that knows nothing of vmferry, such as QEMU: `vmferry-refvm pc-guest`.

pub mod boot;
pub mod dump;
pub mod image;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use serde_json::{Value, json};

use crate::machine::{GuestConfig, Workload};
use crate::options::workload;

/// The first word of the command line that asks for this.
pub const VERB: &str = "pc-guest";

/// The guest of vmferry-refvm for qemu-system-x86_64. Each command prints one JSON object.
#[derive(Debug, Parser)]
#[command(name = "vmferry-refvm pc-guest", bin_name = "vmferry-refvm pc-guest")]
enum Command {
    /// Write firmware and memory contents; prints the options that load them, and the size of a dump for `report`.
    Image {
        /// Directory for the files.
        directory: PathBuf,
        #[command(flatten)]
        guest: GuestArguments,
    },
    /// Print the guest's report out of a copy of its first memory.
    Report {
        /// The copy, from GPA 0.
        dump: PathBuf,
    },
}

/// The shape of a guest, as options.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct GuestArguments {
    /// Guest memory, MiB.
    #[arg(long)]
    pub memory_mib: u64,
    /// Number of vCPUs.
    #[arg(long)]
    pub vcpus: u32,
    /// How the guest touches its memory.
    #[arg(long, value_parser = workload)]
    pub workload: Workload,
    /// Share of touches that rewrite the page, percent.
    #[arg(long)]
    pub write_percent: u32,
    /// Seed of the guest's random numbers and of its pages' content.
    #[arg(long)]
    pub seed: u64,
}

impl GuestArguments {
    /// The guest, without the size of its memory.
    pub fn config(self) -> GuestConfig {
        let Self { vcpus, workload, write_percent, seed, .. } = self;
        GuestConfig { vcpus, workload, write_percent, seed }
    }
}

/// The program after [`VERB`].
pub fn main() -> ExitCode {
    let words = std::env::args_os().enumerate().filter_map(|(number, word)| (number != 1).then_some(word));
    match perform(Command::parse_from(words)) {
        Ok(answer) => {
            println!("{answer}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("vmferry-refvm {VERB}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn perform(command: Command) -> Result<Value, Box<dyn std::error::Error>> {
    match command {
        Command::Image { directory, guest } => {
            let parts = image::loaded(guest.memory_mib << 20, &guest.config(), image::tsc_khz()?);
            let options = image::write(&directory, &parts)?;
            Ok(json!({"options": options, "dump_bytes": dump::DUMP_BYTES}))
        }
        Command::Report { dump } => Ok(serde_json::to_value(dump::of_dump(&dump)?)?),
    }
}

#[cfg(test)]
mod tests;
