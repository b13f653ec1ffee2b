//! The options of the command line.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

use crate::layout::{Backing, MadeOf, PAGE_SIZE, PAGE_SIZES};
use crate::machine::{MakeMachine, Workload};
use crate::protocol::state::Verb;
use crate::{kvm, process};

/// The accelerator of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Accel {
    /// Virtual CPUs of /dev/kvm.
    Kvm,
    /// Threads of this process, for machines without KVM.
    Process,
}

impl Accel {
    /// The maker of its machines.
    pub fn make(self) -> MakeMachine {
        match self {
            Self::Kvm => kvm::make,
            Self::Process => process::make,
        }
    }

    /// As the command line names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Process => "process",
        }
    }

    /// The platform that its device state needs on a destination.
    pub fn platform(self) -> &'static str {
        match self {
            Self::Kvm => "x86_64/kvm",
            Self::Process => "x86_64/process",
        }
    }
}

/// The reference VMM of vmferry: a small VMM with a guest that verifies its own memory.
#[derive(Debug, Clone, Parser)]
#[command(name = "vmferry-refvm", version, after_help = "`vmferry-refvm pc-guest --help`: the same guest for QEMU.")]
#[expect(missing_docs, reason = "the help texts say it")]
pub struct Options {
    /// Name of the VM.
    #[arg(long, value_parser = vm_name)]
    pub vm: String,
    /// The daemon's VMM socket.
    #[arg(long)]
    pub daemon: PathBuf,
    /// Admin socket to make: one JSON object a line ("report", "status", "inject", "quit").
    #[arg(long)]
    pub admin: PathBuf,
    /// What runs the guest.
    #[arg(long, value_enum, default_value = "kvm")]
    pub accel: Accel,
    /// Wait to be the destination of a migration; memory, vCPUs and workload come with it.
    #[arg(long)]
    pub incoming: bool,
    /// Guest memory, e.g. 512M or 2G.
    #[arg(long, default_value = "512M", value_parser = bytes)]
    pub memory: u64,
    #[command(flatten)]
    pub memory_of: MemoryOf,
    /// Let the kernel back pages of 4 KiB by transparent huge pages; a destination's are collapsed after the last page.
    #[arg(long)]
    pub thp: bool,
    /// Split guest memory into so many regions.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    pub regions: u32,
    /// With --incoming: a userfaultfd for each region, not one for all.
    #[arg(long)]
    pub uffd_per_region: bool,
    /// Number of vCPUs.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub vcpus: u32,
    /// How the guest touches its memory.
    #[arg(long, value_parser = workload, default_value = "random")]
    pub workload: Workload,
    /// Share of touches that rewrite the page, percent.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub write_percent: u32,
    /// Seed of the guest's random numbers and of its pages' content.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Never report memory errors to the daemon: then it finds them only by reading.
    #[arg(long)]
    pub mute_errors: bool,
    #[command(flatten)]
    pub faults: TestFaults,
}

/// The backing of guest memory here. With `--incoming` it goes into `hello`; an absent value is as on the source.
#[derive(Debug, Clone, Copy, Default, clap::Args, serde::Serialize)]
pub struct MemoryOf {
    /// Backing of guest memory [default: anonymous; with --incoming: as on the source].
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing: Option<Backing>,
    /// Pages of guest memory: 4K, 2M or 1G [default: 4K; with --incoming: as on the source].
    #[arg(long, value_parser = page_size)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub page_size: Option<u64>,
}

impl MemoryOf {
    /// Whether one of the options is given.
    pub fn is_own(&self) -> bool {
        self.backing.is_some() || self.page_size.is_some()
    }
}

impl From<MemoryOf> for MadeOf {
    fn from(of: MemoryOf) -> Self {
        Self { backing: of.backing.unwrap_or(Backing::Anonymous), page_size: of.page_size.unwrap_or(PAGE_SIZE) }
    }
}

/// Misbehaviour on demand, for tests of a daemon.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "For tests of a daemon")]
pub struct TestFaults {
    /// Answer FAILED to this request, once.
    #[arg(long, value_enum, value_name = "REQUEST")]
    fail_at: Option<Verb>,
    /// Exit (with 3) when this request comes.
    #[arg(long, value_enum, value_name = "REQUEST")]
    die_at: Option<Verb>,
    /// Never answer this request, nor carry it out.
    #[arg(long, value_enum, value_name = "REQUEST")]
    stall_at: Option<Verb>,
}

impl TestFaults {
    /// Whether to answer FAILED now; true once.
    pub fn fails_at(&mut self, verb: Verb) -> bool {
        self.fail_at.take_if(|at| *at == verb).is_some()
    }

    /// Whether to exit now.
    pub fn dies_at(&self, verb: Verb) -> bool {
        self.die_at == Some(verb)
    }

    /// Whether to leave the request unanswered.
    pub fn stalls_at(&self, verb: Verb) -> bool {
        self.stall_at == Some(verb)
    }
}

fn vm_name(text: &str) -> Result<String, String> {
    let rest = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let fits = text.len() <= 63 && text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.chars().all(rest);
    fits.then(|| text.into()).ok_or("must be [a-zA-Z0-9][a-zA-Z0-9._-]{0,62}".into())
}

fn bytes(text: &str) -> Result<u64, String> {
    let (number, shift) = match text.strip_suffix(['K', 'M', 'G']) {
        Some(number) if text.ends_with('K') => (number, 10),
        Some(number) if text.ends_with('M') => (number, 20),
        Some(number) => (number, 30),
        None => (text, 0),
    };
    let value: Option<u64> = number.parse().ok();
    let scaled = value.and_then(|value| value.checked_mul(1 << shift));
    scaled.ok_or_else(|| "must be a number of bytes, or end in K, M or G".into())
}

fn page_size(text: &str) -> Result<u64, String> {
    let found = bytes(text).ok().filter(|size| PAGE_SIZES.contains(size));
    found.ok_or_else(|| "must be 4K, 2M or 1G".into())
}

/// Reads a workload's name.
///
/// # Errors
/// Another word.
pub fn workload(text: &str) -> Result<Workload, String> {
    serde_json::from_value(text.into()).map_err(|_| "must be idle, random, sequential, hot or paced".into())
}

#[cfg(test)]
mod tests;
