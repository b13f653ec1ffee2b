//! What the protocol needs of a guest, whichever way it is run: the seam between `kvm`/`process` and `protocol`.

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

/// What is to be run.
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

/// A poisoned page that a vCPU stumbled over, or that was told to the guest: sent to the protocol, which tells the
/// daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestMemoryError {
    /// GPA of the page's first byte.
    pub gpa: u64,
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
    /// The opposite, in a machine that never ran.
    fn load(&mut self, state: &[u8]) -> Result<(), MachineError>;
    /// Tells the guest of a page found bad before it was consumed: an AO machine check on every vCPU, once a page, unless
    /// an AR for the same page was delivered before. Works on a running or a stopped machine.
    fn inject_action_optional(&mut self, gpa: u64) -> Result<(), MachineError>;
}

/// Makes a machine over memory that is mapped already. `errors` receives every machine check given to the guest.
pub type MakeMachine = fn(
    regions: Arc<[MappedRegion]>,
    config: GuestConfig,
    errors: Sender<GuestMemoryError>,
) -> Result<Box<dyn Machine>, MachineError>;

/// What a machine cannot do.
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
