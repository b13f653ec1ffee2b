//! One vCPU: a thread that touches the pages of its share, verifies them and rewrites some.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::probe::{Probed, probe};
use super::rest;
use crate::guest::config::{IDLE_PAUSE_US, PACED_PAUSE_US, Run};
use crate::guest::report::{
    BUCKETS, MAX_WRONG_PAGES, MachineCheckRecord, ReportHeader, SEVERITY_AO, SEVERITY_AR, VcpuBlock, bucket,
};
use crate::guest::{
    BAD_PAGES_GPA, GENERATIONS_GPA, MAX_RECORDS, PAGE_SIZE, RECORDS_GPA, SEEN_GPA, VCPU_BLOCKS_GPA, content,
};
use crate::machine::{Block, GuestConfig, GuestMemoryError, REPORT_GPA, Ram, Workload};
use crate::memory::hva_of;

/// What a vCPU has in common with the others.
pub struct ProcessContext {
    /// Guest memory.
    pub ram: Ram,
    /// The workload.
    pub config: GuestConfig,
    /// Number of this host in the guest's life, from 1.
    pub epoch: u8,
    /// Set: end before the next touch.
    pub stop: Arc<AtomicBool>,
    /// AO memory errors: (vCPU, page).
    pub waiting: Arc<Mutex<VecDeque<(u32, Block)>>>,
    /// Machine checks given to the guest.
    pub errors: Sender<GuestMemoryError>,
}

/// A vCPU thread's own view.
pub struct ProcessVcpu {
    id: u32,
    shared: ProcessContext,
    kernel: u64,
    thread: u32,
}

/// Ticks of the TSC in a millisecond, measured.
pub fn tsc_khz() -> u64 {
    let (from, ticks) = (Instant::now(), tsc());
    std::thread::sleep(Duration::from_millis(20));
    let (elapsed, ticks) = (from.elapsed(), tsc() - ticks);
    (u128::from(ticks) * 1_000_000 / elapsed.as_nanos().max(1)) as u64
}

fn tsc() -> u64 {
    // SAFETY: every x86-64 has the instruction, and Linux lets user space use it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// xorshift64 (Marsaglia, "Xorshift RNGs", 2003).
fn next_random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// The page with this index in a share.
fn nth_page(runs: &[Run], mut index: u64) -> u64 {
    for run in runs {
        if index < run.count {
            return run.first + index;
        }
        index -= run.count;
    }
    runs[0].first
}

impl ProcessVcpu {
    /// # Safety
    /// The regions stay mapped as long as this lives, SIGBUS is caught, and no other thread has the same `id`.
    pub unsafe fn new(id: u32, shared: ProcessContext) -> Self {
        let kernel = shared.ram.regions[0].hva;
        // SAFETY: a call without arguments.
        let thread = unsafe { libc::gettid() } as u32;
        Self { id, shared, kernel, thread }
    }

    /// Touches pages until told to stop.
    pub fn run(mut self) {
        self.begin_epoch();
        while !self.shared.stop.load(Ordering::Acquire) {
            self.take_action_optional();
            let passes = self.block().passes;
            let pause = match self.shared.config.workload {
                Workload::Idle if passes > 0 => {
                    rest(Duration::from_micros(IDLE_PAUSE_US), &self.shared.stop);
                    continue;
                }
                Workload::Paced => PACED_PAUSE_US,
                _ => 0,
            };
            let page = self.choose();
            self.touch(page);
            let block = self.block();
            block.steps += 1;
            if block.steps >= block.pages {
                block.steps = 0;
                block.passes += 1;
            }
            if pause > 0 {
                rest(Duration::from_micros(pause), &self.shared.stop);
            }
        }
    }

    /// This vCPU's page of the report; a first use on this host waits for it to arrive.
    fn block(&mut self) -> &mut VcpuBlock {
        let at = self.kernel + VCPU_BLOCKS_GPA + u64::from(self.id) * PAGE_SIZE;
        // SAFETY: mapped kernel memory, page-aligned, and used by this thread alone; readers of the report copy it out
        // through the kernel.
        unsafe { &mut *(at as *mut VcpuBlock) }
    }

    fn begin_epoch(&mut self) {
        let epoch = u64::from(self.shared.epoch);
        let block = self.block();
        if block.epoch != epoch {
            block.epoch = epoch;
            block.first_touch = [0; BUCKETS];
            block.first_touch_max = 0;
        }
    }

    fn choose(&mut self) -> u64 {
        let workload = self.shared.config.workload;
        let block = self.block();
        let index = match workload {
            Workload::Idle | Workload::Sequential => {
                let index = block.cursor;
                block.cursor = (index + 1) % block.pages;
                index
            }
            Workload::Random | Workload::Paced => next_random(&mut block.rng) % block.pages,
            Workload::Hot if !next_random(&mut block.rng).is_multiple_of(10) => {
                next_random(&mut block.rng) % block.hot_pages
            }
            Workload::Hot => next_random(&mut block.rng) % block.pages,
        };
        nth_page(&block.runs, index)
    }

    fn touch(&mut self, page: u64) {
        if self.bad_word(page).load(Ordering::Acquire) & bad_bit(page) != 0 {
            self.block().skips += 1;
            return;
        }
        let Some(hva) = hva_of(&self.shared.ram.regions, page * PAGE_SIZE) else { return };
        let before = tsc();
        // SAFETY: a mapped page of the guest; SIGBUS is caught (`new`).
        if unsafe { probe(hva) } == Probed::Poisoned {
            return self.machine_check(self.shared.ram.block_at(page * PAGE_SIZE), true);
        }
        let ticks = tsc() - before;
        // SAFETY: the resume table has a byte for each page of the guest; a page belongs to one vCPU.
        let seen = unsafe { &mut *((self.kernel + SEEN_GPA + page) as *mut u8) };
        if *seen != self.shared.epoch {
            *seen = self.shared.epoch;
            let block = self.block();
            block.first_touch[bucket(ticks)] += 1;
            block.first_touch_max = block.first_touch_max.max(ticks);
        }
        self.verify_and_write(page, hva);
    }

    fn verify_and_write(&mut self, page: u64, hva: u64) {
        let config = self.shared.config;
        // SAFETY: the generation table has a u32 for each page of the guest; a page belongs to one vCPU.
        let generation = unsafe { &mut *((self.kernel + GENERATIONS_GPA + page * 4) as *mut u32) };
        // SAFETY: a whole page of the guest, present since the probe, and touched by this thread alone. Memory errors
        // are made while the vCPUs are stopped, or in place of a page before its first touch.
        let words = unsafe { &mut *(hva as *mut [u64; content::WORDS]) };
        let wrong = content::wrong_bytes(config.seed, page, *generation, words);
        if wrong > 0 {
            self.wrong_page(page, wrong);
        }
        let rewrite = next_random(&mut self.block().rng) % 100 < u64::from(config.write_percent);
        if rewrite {
            *generation = generation.wrapping_add(1);
            self.block().writes += 1;
        }
        if rewrite || wrong > 0 {
            content::fill(config.seed, page, *generation, words);
        }
        self.block().touches += 1;
    }

    fn wrong_page(&mut self, page: u64, wrong: u64) {
        self.block().wrong_bytes += wrong;
        let index = self.header(std::mem::offset_of!(ReportHeader, wrong_pages)).fetch_add(1, Ordering::AcqRel);
        if index < MAX_WRONG_PAGES as u64 {
            let named = std::mem::offset_of!(ReportHeader, wrong_page_gpas) + index as usize * 8;
            self.header(named).store(page * PAGE_SIZE, Ordering::Release);
        }
    }

    fn header(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: a word of the report header, aligned; all threads use it through atomics.
        unsafe { AtomicU64::from_ptr((self.kernel + REPORT_GPA + offset as u64) as *mut u64) }
    }

    fn bad_word(&self, page: u64) -> &AtomicU64 {
        // SAFETY: a word of the bad-page bitmap, aligned; all threads use it through atomics.
        unsafe { AtomicU64::from_ptr((self.kernel + BAD_PAGES_GPA + page / 64 * 8) as *mut u64) }
    }

    fn take_action_optional(&mut self) {
        loop {
            let mut waiting = self.shared.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(index) = waiting.iter().position(|(owner, _)| *owner == self.id) else { return };
            let Some((_, block)) = waiting.remove(index) else { return };
            drop(waiting);
            self.machine_check(block, false);
        }
    }

    /// Marks a page of the backing as bad. False: all of it was before.
    fn mark_bad(&self, block: Block) -> bool {
        // One marks at a time: of two vCPUs that meet the same huge page one is the first.
        let _turn = self.shared.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let first = block.gpa / PAGE_SIZE;
        let pages = first..first + block.size() / PAGE_SIZE;
        pages.fold(false, |new, page| {
            let before = self.bad_word(page).fetch_or(bad_bit(page), Ordering::AcqRel);
            new | (before & bad_bit(page) == 0)
        })
    }

    /// Records a machine check, once a page.
    fn machine_check(&mut self, block: Block, action_required: bool) {
        if !self.mark_bad(block) {
            return;
        }
        let index = self.header(std::mem::offset_of!(ReportHeader, machine_checks)).fetch_add(1, Ordering::AcqRel);
        if index < MAX_RECORDS {
            let at = self.kernel + RECORDS_GPA + index * size_of::<MachineCheckRecord>() as u64;
            let severity = if action_required { SEVERITY_AR } else { SEVERITY_AO };
            // SAFETY: the record with this index is written by this thread alone; the severity comes last, by an atomic.
            unsafe {
                (at as *mut MachineCheckRecord).write(MachineCheckRecord::being_written(block, self.id));
                let written = at + std::mem::offset_of!(MachineCheckRecord, severity) as u64;
                AtomicU32::from_ptr(written as *mut u32).store(severity, Ordering::Release);
            }
        }
        // Nobody listens any more: the VMM is ending.
        let _ = self.shared.errors.send(GuestMemoryError { block, action_required, thread: self.thread });
    }
}

fn bad_bit(page: u64) -> u64 {
    1 << (page % 64)
}
