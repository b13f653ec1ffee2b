//! The guest's configuration at boot: the configuration page, and the share of each vCPU in the pages.

use super::PAGE_SIZE;
use crate::machine::{GuestConfig, KERNEL_BYTES, MappedRegion, Workload};

/// First word of the configuration page.
pub const MAGIC: u64 = u64::from_le_bytes(*b"vmferryg");
/// Most runs that a vCPU's share may have.
pub const MAX_RUNS: usize = 8;
/// How long a paced workload waits after each touch.
pub const PACED_PAUSE_US: u64 = 200;
/// How long an idle workload waits at a time.
pub const IDLE_PAUSE_US: u64 = 50_000;

/// The configuration page, at `CONFIG_GPA`; the guest only reads it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConfigPage {
    /// [`MAGIC`].
    pub magic: u64,
    /// Number of vCPUs.
    pub vcpus: u64,
    /// See [`workload_code`].
    pub workload: u64,
    /// Share of touches that rewrite the page, percent.
    pub write_percent: u64,
    /// Goes into the content of every page.
    pub seed: u64,
    /// Pause between touches, or between looks when idle; µs.
    pub pause_us: u64,
    /// Ticks of the clock of the latency histogram in a millisecond (kHz).
    pub tsc_khz: u64,
    /// How the guest pauses: 0 by [`super::payload::PORT_PAUSE`], which our VMM knows; 1 by the timer of its local APIC
    /// and `hlt`, which every VMM of a whole PC knows.
    pub pause_by_timer: u64,
}

impl ConfigPage {
    /// The page for a guest, on a machine with a TSC of `tsc_khz`.
    pub fn new(config: &GuestConfig, tsc_khz: u64) -> Self {
        let pause_us = match config.workload {
            Workload::Idle => IDLE_PAUSE_US,
            Workload::Paced => PACED_PAUSE_US,
            Workload::Random | Workload::Sequential | Workload::Hot => 0,
        };
        Self {
            magic: MAGIC,
            vcpus: u64::from(config.vcpus),
            workload: workload_code(config.workload),
            write_percent: u64::from(config.write_percent),
            seed: config.seed,
            pause_us,
            tsc_khz,
            pause_by_timer: 0,
        }
    }
}

/// How the guest's code knows a workload.
pub const fn workload_code(workload: Workload) -> u64 {
    match workload {
        Workload::Idle => 0,
        Workload::Random => 1,
        Workload::Sequential => 2,
        Workload::Hot => 3,
        Workload::Paced => 4,
    }
}

/// Pages that follow each other; `count` 0 ends a list.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Run {
    /// Number of the first page, GPA >> 12.
    pub first: u64,
    /// How many pages.
    pub count: u64,
}

/// The pages that workloads use: all but the kernel area.
pub fn workload_runs(regions: &[MappedRegion]) -> Vec<Run> {
    let run = |region: &MappedRegion| {
        let (start, end) = (region.gpa.max(KERNEL_BYTES), region.gpa + region.size);
        Run { first: start / PAGE_SIZE, count: end.saturating_sub(start) / PAGE_SIZE }
    };
    regions.iter().map(run).filter(|run| run.count > 0).collect()
}

/// Each vCPU's share, in order: equal but for the remainder, which goes to the last.
pub fn shares(regions: &[MappedRegion], vcpus: u32) -> Vec<Vec<Run>> {
    let runs = workload_runs(regions);
    let total: u64 = runs.iter().map(|run| run.count).sum();
    let each = total / u64::from(vcpus);
    let bounds = |vcpu: u32| {
        let end = if vcpu + 1 == vcpus { total } else { each * u64::from(vcpu + 1) };
        (each * u64::from(vcpu), end)
    };
    (0..vcpus).map(|vcpu| slice(&runs, bounds(vcpu))).collect()
}

/// The pages `begin..end` of a list of runs, counted along it.
fn slice(runs: &[Run], (begin, end): (u64, u64)) -> Vec<Run> {
    let mut at = 0;
    let mut found = Vec::new();
    for run in runs {
        let (from, to) = (begin.max(at), end.min(at + run.count));
        if from < to {
            found.push(Run { first: run.first + (from - at), count: to - from });
        }
        at += run.count;
    }
    found
}

#[cfg(test)]
mod tests;
