//! The guest's report on itself: the area that begins at `REPORT_GPA`.
//!
//! A header page, one page a vCPU (each written by its vCPU alone), and the machine-check records. The guest is the judge
//! of a migration: it counts the bytes that are not as it left them.

use std::mem::offset_of;

use serde::Serialize;

use super::config::{MAX_RUNS, Run};
use super::{EPOCHS, PAGE_SIZE};
use crate::machine::Block;

/// Buckets of the latency histogram: four for each power of two of ticks.
pub const BUCKETS: usize = 256;
/// How many pages with wrong content are named.
pub const MAX_WRONG_PAGES: usize = 16;
/// Severity in a record: action optional.
pub const SEVERITY_AO: u32 = 1;
/// Severity in a record: action required.
pub const SEVERITY_AR: u32 = 2;

/// First page of the report; counters are changed with locked instructions.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ReportHeader {
    /// Machine checks taken (AO: once a page). May exceed `MAX_RECORDS`.
    pub machine_checks: u64,
    /// Pages found wrong; may exceed [`MAX_WRONG_PAGES`].
    pub wrong_pages: u64,
    /// GPAs of the first of them.
    pub wrong_page_gpas: [u64; MAX_WRONG_PAGES],
    /// Vector + 1 of an exception that the code cannot have; 0: none. Always a defect of this program.
    pub fatal_vector: u64,
    /// Instruction pointer of it.
    pub fatal_rip: u64,
    /// Error code of it.
    pub fatal_code: u64,
    /// CR2 of it.
    pub fatal_cr2: u64,
}

/// A vCPU's page: its counters and its place in the workload.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct VcpuBlock {
    /// Number of the vCPU.
    pub id: u64,
    /// The epoch of the histogram's start.
    pub epoch: u64,
    /// Pages read and verified.
    pub touches: u64,
    /// Pages rewritten.
    pub writes: u64,
    /// Touches left out because the page is known to be bad.
    pub skips: u64,
    /// Bytes that were not as they must be. A wrong page is rewritten, so each is counted once.
    pub wrong_bytes: u64,
    /// As many touches as the share has pages, this many times.
    pub passes: u64,
    /// Touches in the present pass.
    pub steps: u64,
    /// Next page of a sequential pass, an index into the share.
    pub cursor: u64,
    /// State of the random numbers (xorshift64); never 0.
    pub rng: u64,
    /// Pages of the share.
    pub pages: u64,
    /// Pages of its hot part, at least 1.
    pub hot_pages: u64,
    /// Longest first touch of the epoch, ticks.
    pub first_touch_max: u64,
    /// The share.
    pub runs: [Run; MAX_RUNS],
    /// GPA of this vCPU's paravirtual clock page, where the VMM keeps one; 0: none. Its "guest stopped" flag tells the
    /// guest that it was moved; our own VMM raises the epoch in r14 instead.
    pub clock_gpa: u64,
    /// Time stamp counter when the loop last began, ticks.
    pub last_tsc: u64,
    /// Ticks from the last turn of the loop before the present epoch to its first turn. That is the time without a running
    /// guest, if the guest reads the host's own counter. 0 if it had made no turn yet.
    pub blackout: u64,
    /// Unused.
    pub reserved: [u64; 224],
    /// First touches of a page in this epoch, by latency.
    pub first_touch: [u64; BUCKETS],
}

const _: () = assert!(size_of::<VcpuBlock>() == PAGE_SIZE as usize && offset_of!(VcpuBlock, first_touch) == 2048);
const _: () = assert!(size_of::<ReportHeader>() <= PAGE_SIZE as usize);

/// One machine check, as the guest read it from its banks.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct MachineCheckRecord {
    /// GPA of the page.
    pub gpa: u64,
    /// [`SEVERITY_AO`] or [`SEVERITY_AR`]; written last: 0 while the record is being written.
    pub severity: u32,
    /// The vCPU that took it.
    pub vcpu: u16,
    /// log2 of the page's bytes.
    pub lsb: u16,
}

impl MachineCheckRecord {
    /// All but the severity.
    pub fn being_written(block: Block, vcpu: u32) -> Self {
        Self { gpa: block.gpa, severity: 0, vcpu: vcpu as u16, lsb: block.lsb as u16 }
    }
}

/// A machine check of the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MachineCheck {
    /// GPA of the page.
    pub gpa: u64,
    /// log2 of its bytes: 12, or more for a huge page.
    pub lsb: u32,
    /// `"AR"` or `"AO"`.
    pub severity: &'static str,
    /// The vCPU that took it.
    pub vcpu: u32,
}

/// Latency of first touches since the guest began to run on this host; µs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Default)]
pub struct FirstTouch {
    /// Number of touches.
    pub count: u64,
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Longest.
    pub max: f64,
}

/// A bucket of the latency histogram: from, to (half-open, µs), and how many.
pub type LatencyBucket = (f64, f64, u64);

/// The report, summed over the vCPUs.
#[derive(Debug, Clone, PartialEq, Serialize, Default)]
pub struct Report {
    /// Pages read and verified.
    pub touches: u64,
    /// Pages rewritten.
    pub writes: u64,
    /// Touches left out because the page is known to be bad.
    pub skips: u64,
    /// Bytes that were not as they must be.
    pub wrong_bytes: u64,
    /// GPAs of the first pages that were wrong.
    pub wrong_pages: Vec<u64>,
    /// Machine checks, in the guest's order.
    pub machine_checks: Vec<MachineCheck>,
    /// How many of them were consumed (AR).
    pub poisoned_touched: u64,
    /// First touches of a page since the guest runs on this host, however short: by the vCPUs that have begun to.
    pub first_touch_us: FirstTouch,
    /// The histogram behind it: the buckets that are not empty.
    pub first_touch_buckets: Vec<LatencyBucket>,
    /// Longest time that a vCPU was stopped before it ran on this host, µs; see [`VcpuBlock::blackout`].
    pub blackout_us: f64,
    /// Fewest passes that any vCPU has made through its share.
    pub passes: u64,
    /// An exception that must not happen, if one did.
    pub fatal: Option<String>,
}

/// The bucket of a latency.
pub fn bucket(ticks: u64) -> usize {
    let ticks = ticks.max(4);
    let log2 = 63 - ticks.leading_zeros();
    (log2 * 4 + ((ticks >> (log2 - 2)) & 3) as u32) as usize
}

/// The middle of a bucket, ticks.
fn bucket_middle(bucket: usize) -> f64 {
    let (log2, quarter) = (bucket / 4, bucket % 4);
    ((1u64 << log2) as f64) * (1.0 + (quarter as f64 + 0.5) / 4.0)
}

/// The newest epoch with a turn of a vCPU.
pub fn newest(blocks: &[VcpuBlock]) -> Option<u64> {
    // Epochs go round; 0 is that of a vCPU that has made no turn at all.
    let newer = |a: u64, b: u64| (1..128).contains(&((a + EPOCHS - b) % EPOCHS));
    blocks.iter().map(|block| block.epoch).filter(|epoch| *epoch != 0).reduce(|a, b| if newer(b, a) { b } else { a })
}

/// Quantiles of the blocks' histograms. `tsc_khz` 0 (no configuration page) gives zeros.
fn first_touch(blocks: &[&VcpuBlock], tsc_khz: u64) -> FirstTouch {
    let mut sums = [0u64; BUCKETS];
    for block in blocks {
        sums.iter_mut().zip(block.first_touch).for_each(|(sum, count)| *sum += count);
    }
    let count: u64 = sums.iter().sum();
    if count == 0 || tsc_khz == 0 {
        return FirstTouch::default();
    }
    let us = |ticks: f64| ticks * 1000.0 / tsc_khz as f64;
    let longest = blocks.iter().map(|block| block.first_touch_max).max().unwrap_or(0) as f64;
    let quantile = |q: f64| {
        let mut left = ((count as f64) * q).ceil().max(1.0) as u64;
        let found = sums.iter().position(|n| {
            left = left.saturating_sub(*n);
            left == 0
        });
        us(bucket_middle(found.unwrap_or(0)).min(longest))
    };
    FirstTouch { count, p50: quantile(0.5), p99: quantile(0.99), max: us(longest) }
}

/// The buckets of the blocks' histograms that are not empty.
fn buckets(blocks: &[&VcpuBlock], tsc_khz: u64) -> Vec<LatencyBucket> {
    let us = |ticks: f64| ticks * 1000.0 / tsc_khz.max(1) as f64;
    let begin = |bucket: usize| us(2f64.powi((bucket / 4) as i32) * (1.0 + (bucket % 4) as f64 / 4.0));
    let count = |bucket: usize| blocks.iter().map(|block| block.first_touch[bucket]).sum();
    (0..BUCKETS).map(|b| (begin(b), begin(b + 1), count(b))).filter(|(_, _, count)| *count > 0).collect()
}

impl Report {
    /// Sums the blocks of the report area in that epoch; a vCPU that has made no turn in it tells of an earlier host.
    pub fn new(
        header: &ReportHeader,
        blocks: &[VcpuBlock],
        records: &[MachineCheckRecord],
        tsc_khz: u64,
        epoch: Option<u64>,
    ) -> Self {
        let sum = |field: fn(&VcpuBlock) -> u64| blocks.iter().map(field).sum();
        let severity = |record: &MachineCheckRecord| if record.severity == SEVERITY_AR { "AR" } else { "AO" };
        let machine_checks: Vec<_> = records
            .iter()
            .filter(|record| record.severity != 0)
            .map(|record| MachineCheck {
                gpa: record.gpa,
                lsb: record.lsb.into(),
                severity: severity(record),
                vcpu: record.vcpu.into(),
            })
            .collect();
        let begun: Vec<_> = blocks.iter().filter(|block| Some(block.epoch) == epoch).collect();
        let named = header.wrong_pages.min(MAX_WRONG_PAGES as u64) as usize;
        Self {
            touches: sum(|b| b.touches),
            writes: sum(|b| b.writes),
            skips: sum(|b| b.skips),
            wrong_bytes: sum(|b| b.wrong_bytes),
            wrong_pages: header.wrong_page_gpas[..named].to_vec(),
            poisoned_touched: machine_checks.iter().filter(|check| check.severity == "AR").count() as u64,
            machine_checks,
            first_touch_us: first_touch(&begun, tsc_khz),
            first_touch_buckets: buckets(&begun, tsc_khz),
            blackout_us: begun.iter().map(|b| b.blackout).max().unwrap_or(0) as f64 * 1000.0 / tsc_khz.max(1) as f64,
            passes: blocks.iter().map(|block| block.passes).min().unwrap_or(0),
            fatal: (header.fatal_vector != 0).then(|| {
                format!(
                    "exception {} at {:#x}, code {:#x}, cr2 {:#x}",
                    header.fatal_vector - 1,
                    header.fatal_rip,
                    header.fatal_code,
                    header.fatal_cr2
                )
            }),
        }
    }
}

#[cfg(test)]
mod tests;
