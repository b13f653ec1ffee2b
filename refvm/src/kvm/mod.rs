//! The guest on KVM: vCPUs that run the payload of [`crate::guest`], one thread each.
//!
//! No interrupt controller and no devices: a workload, machine checks, and three ports. See `vcpu` for the threads,
//! `signals` for KVM's reports of poison, `state` for the saved state.

mod first_pages;
mod machine_check;
mod registers;
mod signals;
mod state;
mod vcpu;

use std::io;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use first_pages::Helper;
pub use registers::Ring;
use state::{GuestState, VcpuState, host, msr_indices};
use vcpu::{KvmContext, KvmVcpu, VcpuCommand, set_up_machine_checks};

use crate::guest::config::workload_runs;
use crate::guest::mapped::{fill_workload, hva_of, write, write_piece};
use crate::guest::{CONFIG_GPA, MAX_GPA, MAX_VCPUS, PAGE_SIZE, VCPU_BLOCKS_GPA, image, next_epoch};
use crate::machine::{Block, GuestConfig, GuestMemoryError, KERNEL_BYTES, Machine, MachineError, MappedRegion, Ram};
use crate::sigbus::{self, Accelerator};

/// How long the end of a machine waits for its vCPU threads; one that the kernel does not let go is left behind.
const LEAVE_BEHIND_AFTER: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    New,
    Stopped,
    Running,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Phase::New => "new",
            Phase::Stopped => "stopped",
            Phase::Running => "running",
        }
    }
}

struct Thread {
    commands: Sender<VcpuCommand>,
    handle: JoinHandle<()>,
}

/// A guest on KVM.
pub struct KvmMachine {
    vm: VmFd,
    phase: Phase,
    config: GuestConfig,
    ring: Ring,
    tsc_khz: u64,
    /// Special registers of a vCPU after its creation.
    reset: kvm_bindings::kvm_sregs,
    shared: KvmContext,
    /// Pages found bad before the state was loaded.
    early: Vec<Block>,
    /// Touches the first pages of the vCPUs.
    helper: Helper,
    threads: Vec<Thread>,
}

/// Makes a KVM machine, see [`crate::machine::MakeMachine`].
pub fn make(ram: Ram, config: GuestConfig, errors: Sender<GuestMemoryError>) -> Result<Box<dyn Machine>, MachineError> {
    Ok(Box::new(KvmMachine::new(ram, config, errors, Ring::User)?))
}

fn invalid(what: &'static str, text: String) -> MachineError {
    MachineError::Host { what, source: io::Error::new(io::ErrorKind::InvalidInput, text) }
}

fn check(regions: &[MappedRegion], config: &GuestConfig) -> Result<(), MachineError> {
    if !(1..=MAX_VCPUS).contains(&config.vcpus) {
        return Err(invalid("vcpus", format!("{} is not within 1 to {MAX_VCPUS}", config.vcpus)));
    }
    if config.write_percent > 100 {
        return Err(invalid("write_percent", format!("{} is more than 100", config.write_percent)));
    }
    if !regions.first().is_some_and(|region| region.gpa == 0 && region.size >= KERNEL_BYTES) {
        return Err(invalid("memory", format!("the first region must hold {KERNEL_BYTES:#x} bytes at GPA 0")));
    }
    if regions.len() > crate::guest::config::MAX_RUNS || regions.iter().any(|r| r.gpa + r.size > MAX_GPA) {
        return Err(invalid("memory", format!("at most 8 regions below {MAX_GPA:#x}")));
    }
    if workload_runs(regions).iter().map(|run| run.count).sum::<u64>() < u64::from(config.vcpus) {
        return Err(invalid("memory", "less than one page for each vCPU".into()));
    }
    Ok(())
}

impl KvmMachine {
    /// With the choice of the workload's ring.
    pub fn new(
        ram: impl Into<Ram>,
        config: GuestConfig,
        errors: Sender<GuestMemoryError>,
        ring: Ring,
    ) -> Result<Self, MachineError> {
        let ram = ram.into();
        check(&ram.regions, &config)?;
        let kvm = Kvm::new().map_err(|e| host("/dev/kvm", e))?;
        if !kvm.check_extension(Cap::Mce) || !kvm.check_extension(Cap::ImmediateExit) {
            return Err(invalid("/dev/kvm", "KVM_CAP_MCE and KVM_CAP_IMMEDIATE_EXIT are needed".into()));
        }
        let handlers = signals::install_kick().and_then(|()| sigbus::install(Accelerator::Kvm, signals::takes_sigbus));
        handlers.map_err(|source| MachineError::Host { what: "sigaction", source })?;
        let vm = kvm.create_vm().map_err(|e| host("KVM_CREATE_VM", e))?;
        for (slot, region) in (0..).zip(ram.regions.iter()) {
            let memory = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.gpa,
                memory_size: region.size,
                userspace_addr: region.hva,
            };
            // SAFETY: the regions are mapped and stay so for the life of the machine, by the contract of `MappedRegion`.
            unsafe { vm.set_user_memory_region(memory) }.map_err(|e| host("KVM_SET_USER_MEMORY_REGION", e))?;
        }
        let shared =
            KvmContext { ram, told: Arc::new(Mutex::default()), errors, msr_indices: msr_indices(&kvm)?.into() };
        let fds: Vec<VcpuFd> = (0..config.vcpus).map(|id| new_vcpu(&kvm, &vm, id)).collect::<Result<_, _>>()?;
        let reset = fds[0].get_sregs().map_err(|e| host("KVM_GET_SREGS", e))?;
        let tsc_khz = u64::from(fds[0].get_tsc_khz().map_err(|e| host("KVM_GET_TSC_KHZ", e))?);
        let threads = fds.into_iter().enumerate().map(|(id, fd)| spawn(id, fd, &shared)).collect::<Result<_, _>>()?;
        Ok(Self {
            vm,
            phase: Phase::New,
            config,
            ring,
            tsc_khz,
            reset,
            shared,
            early: Vec::new(),
            helper: Helper::default(),
            threads,
        })
    }

    fn require(&self, phase: Phase) -> Result<(), MachineError> {
        if self.phase == phase {
            return Ok(());
        }
        Err(MachineError::WrongState { actual: self.phase.name(), required: phase.name() })
    }

    /// Asks every vCPU the same and collects the answers in order. The question goes to all before the first answer is
    /// waited for.
    fn ask<T>(&self, kick: bool, question: impl Fn(usize, Sender<T>) -> VcpuCommand) -> Result<Vec<T>, MachineError> {
        let answers: Vec<_> = self
            .threads
            .iter()
            .enumerate()
            .map(|(id, thread)| {
                let (sender, answer) = channel();
                // A thread that is gone shows by its missing answer.
                let _ = thread.commands.send(question(id, sender));
                if kick {
                    signals::kick(&thread.handle);
                }
                answer
            })
            .collect();
        let gone = |_| invalid("vCPU", "its thread is gone".into());
        answers.into_iter().map(|answer| answer.recv().map_err(gone)).collect()
    }

    fn tell_all(&self, command: impl Fn() -> VcpuCommand) {
        for thread in &self.threads {
            let _ = thread.commands.send(command());
        }
    }

    /// Stops all vCPUs before it returns; the reason, if one cannot continue.
    fn stand(&self) -> Result<Option<String>, MachineError> {
        Ok(self.ask(true, |_, answer| VcpuCommand::Stand(answer))?.into_iter().flatten().next())
    }

    fn refuse_failed(&self) -> Result<(), MachineError> {
        match self.stand()? {
            Some(reason) => Err(invalid("a vCPU failed", reason)),
            None => Ok(()),
        }
    }
}

fn new_vcpu(kvm: &Kvm, vm: &VmFd, id: u32) -> Result<VcpuFd, MachineError> {
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(|e| host("KVM_GET_SUPPORTED_CPUID", e))?;
    let fd = vm.create_vcpu(u64::from(id)).map_err(|e| host("KVM_CREATE_VCPU", e))?;
    fd.set_cpuid2(&cpuid).map_err(|e| host("KVM_SET_CPUID2", e))?;
    set_up_machine_checks(&fd)?;
    Ok(fd)
}

fn spawn(id: usize, fd: VcpuFd, shared: &KvmContext) -> Result<Thread, MachineError> {
    let (commands, receiver) = channel();
    let vcpu = KvmVcpu::new(fd, receiver, shared.clone());
    let handle = std::thread::Builder::new()
        .name(format!("vcpu{id}"))
        .spawn(move || vcpu.serve())
        .map_err(|source| MachineError::Host { what: "vCPU thread", source })?;
    Ok(Thread { commands, handle })
}

impl Machine for KvmMachine {
    fn boot(&mut self) -> Result<(), MachineError> {
        self.require(Phase::New)?;
        let (regions, config) = (&self.shared.ram.regions, &self.config);
        // SAFETY: the regions are mapped (contract of `MappedRegion`), region 0 holds the kernel area (`check`), all
        // pieces lie in it, and no vCPU has run.
        unsafe {
            for piece in image::processor_pieces(regions, config.vcpus) {
                write_piece(&regions[0], &piece);
            }
            for (gpa, block) in (VCPU_BLOCKS_GPA..).step_by(PAGE_SIZE as usize).zip(image::vcpu_blocks(regions, config))
            {
                write(&regions[0], gpa, block);
            }
            write(&regions[0], CONFIG_GPA, image::config_page(config, self.tsc_khz));
            fill_workload(regions, config.seed);
        }
        let registers = |id: usize| {
            let id = id as u32;
            (registers::general(id), registers::special(self.reset, id, config.vcpus, self.ring))
        };
        let begun = self.ask(false, |id, answer| VcpuCommand::Begin(Box::new(registers(id)), answer))?;
        begun.into_iter().collect::<Result<(), _>>()?;
        self.phase = Phase::Stopped;
        Ok(())
    }

    fn run(&mut self) -> Result<(), MachineError> {
        if self.phase == Phase::Running {
            return Ok(());
        }
        self.require(Phase::Stopped)?;
        self.refuse_failed()?;
        self.tell_all(|| VcpuCommand::Run);
        self.phase = Phase::Running;
        Ok(())
    }

    fn stop(&mut self) -> Result<(), MachineError> {
        if self.phase == Phase::Stopped {
            return Ok(());
        }
        self.require(Phase::Running)?;
        // A failed vCPU stands too; `save` and `run` refuse then.
        self.stand()?;
        self.phase = Phase::Stopped;
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<u8>, MachineError> {
        self.require(Phase::Stopped)?;
        self.refuse_failed()?;
        let clock = self.vm.get_clock().map_err(|e| host("KVM_GET_CLOCK", e))?;
        let vcpus = self.ask(false, |_, answer| VcpuCommand::Save(answer))?.into_iter().collect::<Result<_, _>>()?;
        let told = self.shared.told().clone();
        GuestState::new(self.config, &self.shared.ram.regions, clock, told, vcpus).to_bytes()
    }

    fn load(&mut self, state: &[u8]) -> Result<u64, MachineError> {
        self.require(Phase::New)?;
        let state = GuestState::from_bytes(state, &self.shared.ram.regions, self.config.vcpus)?;
        let clock = kvm_bindings::kvm_clock_data { clock: state.clock.clock, ..Default::default() };
        self.vm.set_clock(&clock).map_err(|e| host("KVM_SET_CLOCK", e))?;
        // All vCPUs go from host to host together.
        let epoch = next_epoch(state.vcpus[0].regs.r14);
        let first = state.vcpus.iter().filter_map(VcpuState::first_pages).collect();
        self.helper.touch(first, self.shared.ram.regions.clone());
        let vcpus = Mutex::new(state.vcpus.into_iter().map(Some).collect::<Vec<_>>());
        let loaded = self.ask(false, |id, answer| {
            let mut vcpus = vcpus.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            match vcpus[id].take() {
                Some(mut vcpu) => {
                    vcpu.regs.r14 = epoch;
                    VcpuCommand::Load(Box::new(vcpu), answer)
                }
                None => VcpuCommand::Quit,
            }
        })?;
        loaded.into_iter().collect::<Result<(), _>>()?;
        *self.shared.told() = state.told;
        self.config = state.config;
        self.phase = Phase::Stopped;
        std::mem::take(&mut self.early).into_iter().try_for_each(|block| self.inject_action_optional(block))?;
        Ok(epoch)
    }

    fn inject_action_optional(&mut self, block: Block) -> Result<(), MachineError> {
        if hva_of(&self.shared.ram.regions, block.gpa).is_none() {
            return Err(invalid("gpa", format!("{:#x} is not RAM", block.gpa)));
        }
        if self.phase == Phase::New {
            self.early.push(block);
            return Ok(());
        }
        // Standing first: a vCPU that has stumbled over the page has then said so.
        self.stand()?;
        if self.shared.told().found(block) {
            self.tell_all(|| VcpuCommand::FoundBad(block));
        }
        if self.phase == Phase::Running {
            self.tell_all(|| VcpuCommand::Run);
        }
        Ok(())
    }

    fn is_helper(&self, thread: u32) -> bool {
        self.helper.is(thread)
    }
}

impl Drop for KvmMachine {
    fn drop(&mut self) {
        let deadline = Instant::now() + LEAVE_BEHIND_AFTER;
        self.tell_all(|| VcpuCommand::Quit);
        for thread in self.threads.drain(..) {
            while !thread.handle.is_finished() && Instant::now() < deadline {
                signals::kick(&thread.handle);
                std::thread::sleep(Duration::from_millis(1));
            }
            if thread.handle.is_finished() {
                let _ = thread.handle.join();
            } else {
                tracing::warn!("kvm.vcpu_thread_left_behind");
            }
        }
    }
}
