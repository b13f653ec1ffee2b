//! `--accel process`: threads of this process for vCPUs, SIGBUS for the machine check. For machines without KVM.
//!
//! The threads run the workloads of `guest` in the same memory layout, with the same content and the same report. Their
//! whole state (place in the workload, random numbers) is in the vCPU blocks in guest memory, and moves with it. Device state
//! is the configuration and the memory errors that no vCPU has taken yet.
//!
//! Threads look at the stop flag between touches. A thread that waits on a page fault cannot be interrupted but by the
//! end of the process: `stop` waits until the fault is answered.

mod probe;
mod vcpu;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::guest::config::{ConfigPage, Run, shares};
use crate::guest::report::VcpuBlock;
use crate::guest::{CONFIG_GPA, FIRST_EPOCH, MAX_GPA, MAX_VCPUS, PAGE_SIZE, VCPU_BLOCKS_GPA, content, next_epoch};
use crate::machine::{Block, GuestConfig, GuestMemoryError, Machine, MachineError, Ram};
use crate::memory::hva_of;
use crate::sigbus::{self, Accelerator};
use vcpu::{ProcessContext, ProcessVcpu};

/// The first bytes of the state, with the version of its form.
const FORMAT: &str = "refvm-process-2";

/// Device state, as JSON.
#[derive(Debug, Serialize, Deserialize)]
struct DeviceState {
    format: String,
    config: GuestConfig,
    /// How many hosts the guest has run on.
    epoch: u8,
    /// AO memory errors not yet taken: (vCPU, page).
    waiting: Vec<(u32, Block)>,
}

/// A guest with threads for vCPUs.
struct ProcessMachine {
    ram: Ram,
    config: GuestConfig,
    epoch: u8,
    /// AO memory errors, by the vCPU that owns the page.
    waiting: Arc<Mutex<VecDeque<(u32, Block)>>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    running: bool,
    ran: bool,
    errors: Sender<GuestMemoryError>,
}

/// Makes a machine of threads.
///
/// # Errors
/// [`MachineError::BadState`] where the configuration does not fit the memory.
pub fn make(ram: Ram, config: GuestConfig, errors: Sender<GuestMemoryError>) -> Result<Box<dyn Machine>, MachineError> {
    if !(1..=MAX_VCPUS).contains(&config.vcpus) {
        return Err(MachineError::BadState(format!("{} vCPUs; 1 to {MAX_VCPUS} are possible", config.vcpus)));
    }
    if ram.regions.iter().any(|r| r.gpa + r.size > MAX_GPA) {
        return Err(MachineError::BadState(format!("memory beyond GPA {MAX_GPA:#x}")));
    }
    sigbus::install(Accelerator::Process, probe::takes_sigbus)
        .map_err(|source| MachineError::Host { what: "sigaction(SIGBUS)", source })?;
    Ok(Box::new(ProcessMachine {
        ram,
        config,
        epoch: FIRST_EPOCH as u8,
        waiting: Arc::default(),
        stop: Arc::default(),
        threads: Vec::new(),
        running: false,
        ran: false,
        errors,
    }))
}

impl ProcessMachine {
    fn require_stopped(&self) -> Result<(), MachineError> {
        if self.running {
            return Err(MachineError::WrongState { actual: "running", required: "stopped" });
        }
        Ok(())
    }

    /// The vCPU with the share that a page begins in; pages of the kernel area belong to the first.
    fn owner(&self, block: Block) -> u32 {
        let page = block.gpa / PAGE_SIZE;
        let owns = |runs: &Vec<Run>| runs.iter().any(|run| (run.first..run.first + run.count).contains(&page));
        let found = shares(&self.ram.regions, self.config.vcpus).iter().position(owns);
        found.map_or(0, |vcpu| vcpu as u32)
    }

    /// # Safety
    /// Region 0 is mapped, nobody runs, and `T` at `gpa` lies in the kernel area.
    unsafe fn write<T>(&self, gpa: u64, value: T) {
        // SAFETY: the caller's promise; the kernel area is page-aligned and so is every structure in it.
        unsafe { ((self.ram.regions[0].hva + gpa) as *mut T).write(value) }
    }
}

impl Machine for ProcessMachine {
    fn boot(&mut self) -> Result<(), MachineError> {
        self.require_stopped()?;
        let config = ConfigPage::new(&self.config, vcpu::tsc_khz());
        // SAFETY: the machine is stopped, and the page is in the kernel area.
        unsafe { self.write(CONFIG_GPA, config) };
        for (id, runs) in (0u32..).zip(shares(&self.ram.regions, self.config.vcpus)) {
            for page in runs.iter().flat_map(|run| run.first..run.first + run.count) {
                let Some(hva) = hva_of(&self.ram.regions, page * PAGE_SIZE) else { continue };
                // SAFETY: a whole page of guest memory, aligned; the machine is stopped.
                content::fill(self.config.seed, page, 0, unsafe { &mut *(hva as *mut [u64; content::WORDS]) });
            }
            let block = first_block(id, &runs, &self.config)?;
            // SAFETY: as above; each vCPU has a page for its block.
            unsafe { self.write(VCPU_BLOCKS_GPA + u64::from(id) * PAGE_SIZE, block) };
        }
        Ok(())
    }

    fn run(&mut self) -> Result<(), MachineError> {
        self.require_stopped()?;
        self.stop.store(false, Ordering::Release);
        self.running = true;
        self.ran = true;
        for id in 0..self.config.vcpus {
            let shared = ProcessContext {
                ram: self.ram.clone(),
                config: self.config,
                epoch: self.epoch,
                stop: Arc::clone(&self.stop),
                waiting: Arc::clone(&self.waiting),
                errors: self.errors.clone(),
            };
            let thread = std::thread::Builder::new().name(format!("vcpu{id}"));
            // SAFETY: the machine joins its threads before it is dropped, and memory outlives the machine.
            let spawned = thread.spawn(move || unsafe { ProcessVcpu::new(id, shared) }.run());
            self.threads.push(spawned.map_err(|source| MachineError::Host { what: "vCPU thread", source })?);
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), MachineError> {
        self.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            if thread.join().is_err() {
                tracing::error!("vcpu.panicked");
            }
        }
        self.running = false;
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<u8>, MachineError> {
        self.require_stopped()?;
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect();
        let state = DeviceState { format: FORMAT.into(), config: self.config, epoch: self.epoch, waiting };
        serde_json::to_vec(&state).map_err(|error| MachineError::BadState(error.to_string()))
    }

    fn load(&mut self, state: &[u8]) -> Result<u64, MachineError> {
        if self.ran {
            return Err(MachineError::WrongState { actual: "one that ran", required: "one that never ran" });
        }
        let state: DeviceState =
            serde_json::from_slice(state).map_err(|error| MachineError::BadState(error.to_string()))?;
        if state.format != FORMAT {
            return Err(MachineError::BadState(format!("format {:?}, must be {FORMAT:?}", state.format)));
        }
        if state.config.vcpus != self.config.vcpus {
            let (found, made) = (state.config.vcpus, self.config.vcpus);
            return Err(MachineError::BadState(format!("of {found} vCPUs, this machine has {made}")));
        }
        self.config = state.config;
        self.epoch = next_epoch(state.epoch.into()) as u8;
        // Behind those that were found bad before the state came.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).extend(state.waiting);
        Ok(self.epoch.into())
    }

    fn inject_action_optional(&mut self, block: Block) -> Result<(), MachineError> {
        let owner = self.owner(block);
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push_back((owner, block));
        for thread in &self.threads {
            thread.thread().unpark();
        }
        Ok(())
    }

    fn is_helper(&self, _thread: u32) -> bool {
        false
    }
}

impl Drop for ProcessMachine {
    fn drop(&mut self) {
        // Stopping threads of this process has no way to fail.
        let _ = self.stop();
    }
}

fn first_block(id: u32, runs: &[Run], config: &GuestConfig) -> Result<VcpuBlock, MachineError> {
    // SAFETY: a plain structure of integers.
    let mut block: VcpuBlock = unsafe { std::mem::zeroed() };
    if runs.len() > block.runs.len() {
        return Err(MachineError::BadState(format!(
            "vCPU {id}: pages in {} runs, at most {}",
            runs.len(),
            block.runs.len()
        )));
    }
    block.runs[..runs.len()].copy_from_slice(runs);
    block.id = u64::from(id);
    block.rng = (config.seed ^ (u64::from(id) + 1).wrapping_mul(content::PAGE_FACTOR)).max(1);
    block.pages = runs.iter().map(|run| run.count).sum();
    block.hot_pages = (block.pages / 10).max(1);
    Ok(block)
}

/// Waits until `until`, or a moment for an unpark.
fn rest(pause: Duration, stop: &AtomicBool) {
    let until = Instant::now() + pause;
    if !stop.load(Ordering::Acquire) {
        std::thread::park_timeout(until.saturating_duration_since(Instant::now()));
    }
}
