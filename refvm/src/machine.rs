//! The protocol's view of a guest, for every way to run it: the seam between `kvm`/`process` and `protocol`.

use std::sync::Arc;
use std::sync::mpsc::Sender;

/// Guest memory as mapped in this process. Made by `memory.rs`, shared by machine, injector and protocol.
/// Regions are in ascending GPA order; the first begins at GPA 0 and holds the payload in its first
/// [`KERNEL_BYTES`].
#[derive(Debug, Clone)]
pub struct MappedRegion {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Where it is mapped in this process.
    pub hva: u64,
    /// Bytes.
    pub size: u64,
}

/// Guest memory as a machine is made over it.
#[derive(Debug, Clone)]
pub struct Ram {
    /// Where it is.
    pub regions: Arc<[MappedRegion]>,
    /// Bytes of a page of each region's backing: the loss of one memory error.
    pub page_sizes: Arc<[u64]>,
}

impl Ram {
    /// The page of the backing around an address of the guest's memory; a page of 4 KiB elsewhere.
    pub fn block_at(&self, gpa: u64) -> Block {
        let inside = |region: &MappedRegion| (region.gpa..region.gpa + region.size).contains(&gpa);
        let found = self.regions.iter().zip(self.page_sizes.iter()).find(|(region, _)| inside(region));
        found.map_or(Block::page(gpa), |(_, page_size)| Block::around(gpa, page_size.trailing_zeros()))
    }
}

/// Memory of 4 KiB pages.
impl From<Arc<[MappedRegion]>> for Ram {
    fn from(regions: Arc<[MappedRegion]>) -> Self {
        let page_sizes = regions.iter().map(|_| 1 << LSB_4K).collect();
        Self { regions, page_sizes }
    }
}

/// log2 of the bytes of a 4 KiB page.
pub const LSB_4K: u32 = 12;
/// log2 of the bytes of the largest page, 1 GiB.
pub const LSB_1G: u32 = 30;

/// An aligned block of guest memory that is bad as a whole: a page of any size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct Block {
    /// GPA of the first byte.
    pub gpa: u64,
    /// log2 of its bytes, as a machine check has it (Intel SDM vol. 3B, 17.3.2.4); 12 to 30.
    pub lsb: u32,
}

impl Block {
    /// The block of `1 << lsb` bytes around an address. Below 12 counts as 12 (no page is smaller), above 30 as 30.
    pub fn around(gpa: u64, lsb: u32) -> Self {
        let lsb = lsb.clamp(LSB_4K, LSB_1G);
        Self { gpa: gpa >> lsb << lsb, lsb }
    }

    /// The 4 KiB page around an address.
    pub fn page(gpa: u64) -> Self {
        Self::around(gpa, LSB_4K)
    }

    /// Bytes.
    pub fn size(self) -> u64 {
        1 << self.lsb
    }

    /// Whether all of `other` lies in this one.
    pub fn covers(self, other: Self) -> bool {
        self.lsb >= other.lsb && Self::around(other.gpa, self.lsb) == self
    }
}

/// Bytes at the start of region 0 that belong to the payload (page tables, IDT, stacks, code, report page, bad-page
/// bitmap); workloads and injected errors keep out of them.
pub const KERNEL_BYTES: u64 = 16 << 20;

/// GPA of the report page (see `guest::Report`).
pub const REPORT_GPA: u64 = 0x10_0000;

/// How the workload touches memory. Each vCPU owns an equal, contiguous share of the pages, so that a page is only
/// ever touched by one vCPU and its content can be verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Workload {
    /// Touches nothing after the first pass.
    Idle,
    /// Pages in random order.
    Random,
    /// Pages in ascending order, around.
    Sequential,
    /// 90 % of the touches on 10 % of the pages.
    Hot,
    /// Random, with a pause between touches.
    Paced,
}

/// The guest to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct GuestConfig {
    /// Number of vCPUs, 1 to 16.
    pub vcpus: u32,
    /// The workload.
    pub workload: Workload,
    /// Share of touches that rewrite the page, percent.
    pub write_percent: u32,
    /// Seed of the guest's random numbers.
    pub seed: u64,
}

/// A poisoned page that a vCPU consumed, or an early error that the guest learned of. The control loop reports it to the
/// daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestMemoryError {
    /// The page, as large as its backing's pages are.
    pub block: Block,
    /// True: AR (a vCPU consumed it), false: AO.
    pub action_required: bool,
    /// Thread id of the vCPU.
    pub thread: u32,
}

/// A guest that can be run, stopped, saved and loaded. All methods may be called from any one thread; none of them
/// touches guest memory in that thread (a fault there would block it), but for `boot`.
pub trait Machine: Send {
    /// Puts payload, page tables and first contents into memory; for a guest that starts here.
    fn boot(&mut self) -> Result<(), MachineError>;
    /// Runs the vCPUs (again).
    fn run(&mut self) -> Result<(), MachineError>;
    /// Returns when no vCPU runs any more, and none will touch memory. Must work while vCPU threads wait on page faults
    /// of a source that is gone only as far as the kernel lets them be interrupted.
    fn stop(&mut self) -> Result<(), MachineError>;
    /// All state but memory, self-describing; the machine is stopped.
    fn save(&mut self) -> Result<Vec<u8>, MachineError>;
    /// The opposite, in a machine that never ran. Returns the epoch that begins here, see
    /// [`next_epoch`](crate::guest::next_epoch).
    fn load(&mut self, state: &[u8]) -> Result<u64, MachineError>;
    /// Injects an AO machine check on every vCPU, for a page found bad before a vCPU consumed it. Once a page, and not after an
    /// AR for the same page. Works on a running or a stopped machine. A machine that waits for its state, on a destination,
    /// injects it after the load.
    fn inject_action_optional(&mut self, block: Block) -> Result<(), MachineError>;
    /// Whether a thread touches guest memory for the machine without being a vCPU: no vCPU consumes the errors that it
    /// finds.
    fn is_helper(&self, thread: u32) -> bool;
}

/// Makes a machine over memory that is mapped already. `errors` receives every machine check given to the guest.
pub type MakeMachine =
    fn(ram: Ram, config: GuestConfig, errors: Sender<GuestMemoryError>) -> Result<Box<dyn Machine>, MachineError>;

/// A machine's failure.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The host lacks something.
    #[error("{what}: {source}")]
    Host {
        /// The call that failed.
        what: &'static str,
        /// Its error.
        source: std::io::Error,
    },
    /// The state handed to `load` is not one of ours.
    #[error("device state: {0}")]
    BadState(String),
    /// Not possible in the machine's present state.
    #[error("machine is {actual}, must be {required}")]
    WrongState {
        /// As it is.
        actual: &'static str,
        /// As it must be.
        required: &'static str,
    },
}

#[cfg(test)]
mod tests;
