//! A guest to be tested, one at a time: the machine has few cores, and the guests use them.
use vmferry_patience::patient;

use std::mem::offset_of;
use std::ops::{Deref, DerefMut};
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use vmferry_refvm::guest::config::ConfigPage;
use vmferry_refvm::guest::mapped::hva_of;
use vmferry_refvm::guest::report::{Report, VcpuBlock};
use vmferry_refvm::guest::{CONFIG_GPA, GENERATIONS_GPA, VCPU_BLOCKS_GPA};
use vmferry_refvm::inject::{self, Means};
use vmferry_refvm::kvm::{KvmMachine, Ring};
use vmferry_refvm::layout::{Backing, RegionSpec};
use vmferry_refvm::machine::{GuestConfig, GuestMemoryError, KERNEL_BYTES, Machine, Ram, Workload};
use vmferry_refvm::memory::GuestMemory;
use vmferry_refvm::report_reader;

pub const PAGE: u64 = 4096;
/// GPA of the first page of the workload.
pub const FIRST: u64 = KERNEL_BYTES;

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

pub struct Guest {
    // Dropped in this order: the machine before its memory.
    pub machine: KvmMachine,
    pub errors: Receiver<GuestMemoryError>,
    pub memory: GuestMemory,
    _turn: Option<MutexGuard<'static, ()>>,
}

/// False, with the reason printed, where there is no KVM.
pub fn has_kvm() -> bool {
    let usable = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &usable {
        println!("SKIPPED: /dev/kvm: {error}");
    }
    usable.is_ok()
}

pub fn config(vcpus: u32, workload: Workload, write_percent: u32) -> GuestConfig {
    GuestConfig { vcpus, workload, write_percent, seed: 0x5eed }
}

/// The turn of a guest, which others wait for.
pub fn only_one() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A booted and stopped guest; none without KVM.
pub fn booted(mib: u64, regions: usize, config: GuestConfig, ring: Ring) -> Option<Guest> {
    if !has_kvm() {
        return None;
    }
    let turn = only_one();
    let memory = memory(mib, regions);
    let mut guest = over(memory, config, ring);
    guest._turn = Some(turn);
    guest.machine.boot().unwrap();
    Some(guest)
}

/// So much memory in one region, or in two with a hole between them that ends at 4 GiB.
pub fn memory(mib: u64, regions: usize) -> GuestMemory {
    let spec = |gpa, size| RegionSpec { gpa, size, page_size: PAGE, backing: Backing::Anonymous };
    let half = ((mib << 20) - KERNEL_BYTES) / 2;
    let specs = match regions {
        1 => vec![spec(0, mib << 20)],
        _ => vec![spec(0, KERNEL_BYTES + half), spec(4 << 30, half)],
    };
    GuestMemory::new(&specs).unwrap()
}

/// A machine that never ran, over that memory.
pub fn over(memory: GuestMemory, config: GuestConfig, ring: Ring) -> Guest {
    let ram = memory.ram();
    over_ram(memory, ram, config, ring)
}

/// The same, where `ram` says other things of the memory than it does itself.
pub fn over_ram(memory: GuestMemory, ram: Ram, config: GuestConfig, ring: Ring) -> Guest {
    let (sender, errors) = channel();
    let machine = KvmMachine::new(ram, config, sender, ring).unwrap();
    Guest { machine, errors, memory, _turn: None }
}

/// Waits for something that must come; the deadline is far beyond what a slow machine needs.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patient(60.0);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

impl Deref for Guest {
    type Target = KvmMachine;
    fn deref(&self) -> &KvmMachine {
        &self.machine
    }
}

impl DerefMut for Guest {
    fn deref_mut(&mut self) -> &mut KvmMachine {
        &mut self.machine
    }
}

impl Guest {
    pub fn report(&self) -> Report {
        report_reader::read_newest(&self.memory.mapped()[0]).unwrap()
    }

    pub fn until(&self, what: &str, condition: impl Fn(&Report) -> bool) -> Report {
        let report = until(&format!("{what}; last {:?}", self.report()), || {
            let report = self.report();
            (condition(&report) || report.fatal.is_some()).then_some(report)
        });
        assert_eq!(report.fatal, None);
        report
    }

    /// Waits until every vCPU has gone through its share `more` times from now on.
    pub fn passes(&self, more: u64) -> Report {
        // A vCPU may be in the middle of a pass, and one may be far ahead of another.
        let wanted: Vec<u64> = self.passes_of_vcpus().iter().map(|passes| passes + more + 1).collect();
        self.until("passes", |_| self.passes_of_vcpus().iter().zip(&wanted).all(|(passes, wanted)| passes >= wanted))
    }

    fn passes_of_vcpus(&self) -> Vec<u64> {
        let vcpus: u64 = self.value(CONFIG_GPA + offset_of!(ConfigPage, vcpus) as u64);
        let passes = |vcpu| self.value(VCPU_BLOCKS_GPA + vcpu * PAGE + offset_of!(VcpuBlock, passes) as u64);
        (0..vcpus).map(passes).collect()
    }

    /// How often the guest has rewritten the page.
    pub fn generation(&self, gpa: u64) -> u32 {
        self.value(GENERATIONS_GPA + gpa / PAGE * 4)
    }

    /// A number that the guest may be writing.
    fn value<T: Into<u64> + Copy>(&self, gpa: u64) -> T {
        // SAFETY: guest memory, mapped as long as this guest lives; the tables of the kernel area are aligned.
        unsafe { (self.hva(gpa) as *const T).read_volatile() }
    }

    pub fn hva(&self, gpa: u64) -> u64 {
        hva_of(&self.memory.mapped(), gpa).unwrap()
    }

    /// The page of the backing; the guest is stopped.
    pub fn poison(&self, gpa: u64) {
        self.make_bad(gpa, Means::Marker);
    }

    /// The same; with [`Means::Frame`] a frame of the host is out of service until it boots again.
    pub fn make_bad(&self, gpa: u64, means: Means) {
        let block = self.memory.ram().block_at(gpa);
        let shared = self.memory.regions().iter().any(|region| region.file.is_some());
        inject::memory_error(inject::Page { block, hva: self.hva(block.gpa), shared }, means, None).unwrap();
    }

    pub fn flip_byte(&self, gpa: u64) {
        let byte = self.hva(gpa) as *mut u8;
        // SAFETY: guest memory, and the guest is stopped.
        unsafe { byte.write_volatile(byte.read_volatile() ^ 0x40) };
    }

    /// (GPA, AR) of every machine check that the machine has announced since the last call.
    pub fn announced(&self) -> Vec<(u64, bool)> {
        self.errors.try_iter().map(|error| (error.block.gpa, error.action_required)).collect()
    }
}

/// (GPA, severity), sorted.
pub fn checks(report: &Report) -> Vec<(u64, &'static str)> {
    let mut checks: Vec<_> = report.machine_checks.iter().map(|check| (check.gpa, check.severity)).collect();
    checks.sort_unstable();
    checks
}
