//! The part of the benchmark that is not Python.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod bound;
mod flame;
mod floor;
mod late;
mod other;
mod paper;
mod stages;
mod touch;
mod uffd;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use serde_json::json;
use vmferry_pager::internals::CpuSet;
use vmferry_refvm::layout::Backing;
use vmferry_refvm::pc::GuestArguments;

/// Parts of the benchmark. Each prints one JSON object.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// CPUs to run on, e.g. `1`; none: anywhere.
    #[arg(long, value_name = "CPUS", default_value = "")]
    cpus: CpuSet,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a guest with all contents at hand, during a bare stream of as much: the least work of any move.
    Bound {
        #[command(flatten)]
        guest: GuestArguments,
        /// Backing of the memory.
        #[arg(long, value_enum, default_value = "anonymous")]
        backing: Backing,
        /// The limit of the stream, MiB/s; 0: none.
        #[arg(long, default_value_t = 0)]
        push_mib_s: u64,
    },
    /// The other process of `bound`.
    #[command(hide = true)]
    BoundSource {
        /// The guest, as JSON.
        moved: String,
    },
    /// Be the VMM of a source: memory full of content, attached to a pager until standard input ends.
    Hold {
        /// The pager's memory socket.
        socket: String,
        /// Name of the VM.
        #[arg(long)]
        vm: String,
        /// Guest memory, MiB.
        #[arg(long)]
        memory_mib: u64,
        /// Backing of the memory.
        #[arg(long, value_enum, default_value = "anonymous")]
        backing: Backing,
    },
    /// Be the VMM of a destination, which touches the pages that lines of standard input name: {"pages", "pause_us"}.
    Touch {
        /// The pager's memory socket.
        socket: String,
        /// Name of the VM.
        #[arg(long)]
        vm: String,
        /// Guest memory, MiB.
        #[arg(long)]
        memory_mib: u64,
        /// Backing of the memory.
        #[arg(long, value_enum, default_value = "anonymous")]
        backing: Backing,
        /// Features of userfaultfd, by their kernel names.
        #[arg(long, value_delimiter = ',')]
        features: Vec<String>,
    },
    /// Time faults with nothing but userfaultfd and TCP between two processes.
    Floor {
        /// How many.
        #[arg(long, default_value_t = 2000)]
        touches: u64,
        /// After each.
        #[arg(long, default_value_t = 500)]
        pause_us: u64,
        /// Backing of the memory.
        #[arg(long, value_enum, default_value = "anonymous")]
        backing: Backing,
        /// CPUs of the other process; none: anywhere.
        #[arg(long, value_name = "CPUS", default_value = "")]
        source_cpus: String,
    },
    /// Time each stage of a fault by itself.
    Stages {
        /// How often.
        #[arg(long, default_value_t = 2000)]
        times: u64,
        /// After each.
        #[arg(long, default_value_t = 500)]
        pause_us: u64,
        /// Backing of the memory.
        #[arg(long, value_enum, default_value = "anonymous")]
        backing: Backing,
    },
    /// See how late a real-time thread wakes on each CPU; nothing else should run.
    Late {
        /// For how long.
        #[arg(long, default_value_t = 10)]
        seconds: u64,
    },
    /// Make the page table of a large VM, and what its source keeps, and measure both.
    Paper {
        /// Where the table is made; best on a tmpfs.
        directory: PathBuf,
        /// Guest memory, GiB.
        #[arg(long, default_value_t = 1024)]
        memory_gib: u64,
    },
    /// Draw a flame graph of the output of `perf script`, and write the same as folded stacks.
    Flame {
        /// Output of `perf script`.
        script: PathBuf,
        /// The flame graph to write.
        #[arg(long)]
        svg: PathBuf,
        /// The folded stacks to write.
        #[arg(long)]
        folded: PathBuf,
        /// Its title.
        #[arg(long)]
        title: String,
    },
    /// The other process of `floor`.
    #[command(hide = true)]
    FloorSource,
}

fn perform(command: Command) -> Result<serde_json::Value, Box<dyn std::error::Error>> {
    match command {
        Command::Bound { guest, backing, push_mib_s } => {
            let moved = bound::Moved { memory: guest.memory_mib << 20, backing, config: guest.config() };
            Ok(serde_json::to_value(bound::run(&moved, push_mib_s << 20)?)?)
        }
        Command::BoundSource { moved } => {
            bound::source(&serde_json::from_str(&moved)?)?;
            Ok(json!("ended"))
        }
        Command::Hold { socket, vm, memory_mib, backing } => {
            touch::hold(&socket, &vm, memory_mib, backing)?;
            Ok(json!("ended"))
        }
        Command::Touch { socket, vm, memory_mib, backing, features } => {
            touch::serve(&socket, &vm, memory_mib, backing, &features)?;
            Ok(json!("ended"))
        }
        Command::Floor { touches, pause_us, backing, source_cpus } => {
            Ok(serde_json::to_value(floor::run(touches, pause_us, backing, &source_cpus)?)?)
        }
        Command::Stages { times, pause_us, backing } => {
            Ok(serde_json::to_value(stages::run(times, pause_us, backing)?)?)
        }
        Command::Late { seconds } => Ok(serde_json::to_value(late::measure(seconds)?)?),
        Command::Paper { directory, memory_gib } => {
            Ok(serde_json::to_value(paper::measure(&directory, memory_gib << 30)?)?)
        }
        Command::Flame { script, svg, folded, title } => {
            flame::draw(&script, &svg, &folded, &title)?;
            Ok(json!("drawn"))
        }
        Command::FloorSource => {
            floor::source()?;
            Ok(json!("ended"))
        }
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    options.cpus.pin();
    match perform(options.command) {
        Ok(answer) => {
            println!("{answer}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("vmferry-bench-native: {error}");
            ExitCode::FAILURE
        }
    }
}
