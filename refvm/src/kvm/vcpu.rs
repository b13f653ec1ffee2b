//! One vCPU and its thread, which alone enters `KVM_RUN` and touches the vCPU's state.
//!
//! ```text
//!              Run                       kick + Stand, or failure
//!   standing ───────▶ running ────────────────────────────────────▶ standing
//! ```
//!
//! Everybody else sends [`VcpuCommand`]s; to a running vCPU with a kick after it. Every exit is finished before the next
//! command is looked at, so a standing vCPU has nothing pending in KVM that would not be saved.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvm_bindings::{kvm_regs, kvm_sregs, kvm_x86_mce};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::machine_check::{CAPABILITIES, IN_PROGRESS, Severity, Told, machine_check};
use super::signals::{Alarm, Installed, Slot};
use super::state::{VcpuState, host, load_vcpu, read_msr, save_vcpu};
use crate::guest::mapped::{gpa_of, hva_of};
use crate::guest::payload::{MSR_MCG_STATUS, PORT_FATAL, PORT_HANDLED, PORT_PAUSE, payload};
use crate::machine::{Block, GuestMemoryError, MachineError, Ram};

ioctl_iow_nr!(KVM_X86_SETUP_MCE, kvm_bindings::KVMIO, 0x9c, u64);
ioctl_iow_nr!(KVM_X86_SET_MCE, kvm_bindings::KVMIO, 0x9e, kvm_x86_mce);

/// Time until a vCPU is asked again, if it was in a handler when a page went bad; about as long as one takes where ring 0
/// is emulated.
const ASK_AGAIN_AFTER: Duration = Duration::from_micros(200);

/// A request to a vCPU thread.
pub enum VcpuCommand {
    /// Set the registers with which the guest begins.
    Begin(Box<(kvm_regs, kvm_sregs)>, Sender<Result<(), MachineError>>),
    /// Run until told to stand.
    Run,
    /// Stand, and answer then; the answer says why the vCPU cannot run any more, if so.
    Stand(Sender<Option<String>>),
    /// Tell the guest of a page found bad, when it can take it. Only sent to a standing vCPU.
    FoundBad(Block),
    /// Save (standing).
    Save(Sender<Result<VcpuState, MachineError>>),
    /// Load (standing).
    Load(Box<VcpuState>, Sender<Result<(), MachineError>>),
    /// End the thread.
    Quit,
}

/// The shared state of a machine's vCPUs.
#[derive(Clone)]
pub struct KvmContext {
    /// Guest memory.
    pub ram: Ram,
    /// The errors that the guest knows.
    pub told: Arc<Mutex<Told>>,
    /// Receives every machine check given to the guest.
    pub errors: Sender<GuestMemoryError>,
    /// The MSRs to save.
    pub msr_indices: Arc<[u32]>,
}

impl KvmContext {
    /// The ledger, even after a panic of its holder: its operations leave it whole.
    pub fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why `KVM_RUN` returned.
enum Exit {
    Interrupted,
    Handled,
    Pause(Duration),
    /// A page is poison; GPA of the access, and how KVM told.
    Poison(u64, Way),
    Failed(String),
}

/// How KVM tells of poison.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// SIGBUS in the vCPU thread: the vCPU itself touched the page.
    Signal,
    /// The access was emulated, and there is nothing at that address for KVM.
    Mmio,
    /// `KVM_EXIT_MEMORY_FAULT`.
    MemoryFault,
}

/// How a command leaves the run loop.
enum Next {
    GoOn,
    Stand,
    Quit,
}

/// A vCPU, owned by its thread.
pub struct KvmVcpu {
    fd: VcpuFd,
    commands: Receiver<VcpuCommand>,
    shared: KvmContext,
    waiting: VecDeque<Block>,
    /// A command that arrived during a pause.
    early: Option<VcpuCommand>,
    /// The guest asked for a pause and has not run since.
    pausing: bool,
    failed: Option<String>,
    thread: u32,
}

/// Gives a new vCPU its machine-check banks.
pub fn set_up_machine_checks(fd: &VcpuFd) -> Result<(), MachineError> {
    // SAFETY: the ioctl reads a u64.
    let result = unsafe { ioctl_with_ref(fd, KVM_X86_SETUP_MCE(), &CAPABILITIES) };
    if result < 0 { Err(host("KVM_X86_SETUP_MCE", kvm_ioctls::Error::last())) } else { Ok(()) }
}

impl KvmVcpu {
    /// Not running yet.
    pub fn new(fd: VcpuFd, commands: Receiver<VcpuCommand>, shared: KvmContext) -> Self {
        Self { fd, commands, shared, waiting: VecDeque::new(), early: None, pausing: false, failed: None, thread: 0 }
    }

    /// The thread's life.
    pub fn serve(mut self) {
        // SAFETY: gettid has no preconditions.
        self.thread = unsafe { libc::gettid() } as u32;
        self.enter_once();
        let immediate_exit = &raw mut self.fd.get_kvm_run().immediate_exit;
        // SAFETY: kvm_run is mapped as long as `self.fd` lives, which is longer than the slot.
        let slot = unsafe { Slot::new(immediate_exit, self.shared.ram.regions.clone()) };
        let installed = slot.install();
        let alarm = match Alarm::new() {
            Ok(alarm) => alarm,
            Err(error) => return tracing::error!(%error, "kvm.no_timer"),
        };
        while let Some(command) = self.early.take().or_else(|| self.commands.recv().ok()) {
            match command {
                VcpuCommand::Run if self.failed.is_none() => {
                    if self.run(&installed, &alarm) {
                        return;
                    }
                }
                VcpuCommand::Quit => return,
                command => self.obey(command),
            }
        }
    }

    /// KVM's parts for a VM's first entry (a kernel thread: `kvm_mmu_post_init_vm`) are made now, and not while a VM is
    /// stopped.
    fn enter_once(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        if let Ok(exit) = self.fd.run() {
            tracing::warn!(?exit, "kvm.entered_too_early");
        }
        self.fd.set_kvm_immediate_exit(0);
    }

    /// Commands that a standing vCPU obeys. An answer nobody waits for any more is dropped.
    fn obey(&mut self, command: VcpuCommand) {
        match command {
            VcpuCommand::Begin(registers, answer) => {
                let (regs, sregs) = *registers;
                let set = self.fd.set_sregs(&sregs).map_err(|e| host("KVM_SET_SREGS", e));
                let set = set.and_then(|()| self.fd.set_regs(&regs).map_err(|e| host("KVM_SET_REGS", e)));
                let _ = answer.send(set);
            }
            VcpuCommand::Stand(answer) => drop(answer.send(self.failed.clone())),
            VcpuCommand::FoundBad(block) => self.waiting.push_back(block),
            VcpuCommand::Save(answer) => {
                let waiting = self.waiting.iter().copied().collect();
                let _ = answer.send(save_vcpu(&self.fd, &self.shared.msr_indices, waiting));
            }
            VcpuCommand::Load(state, answer) => {
                self.waiting = state.waiting.iter().copied().collect();
                let _ = answer.send(load_vcpu(&self.fd, &state));
            }
            VcpuCommand::Run | VcpuCommand::Quit => {}
        }
    }

    /// Runs until it is told to stop, or to quit (true), or until the vCPU cannot continue.
    fn run(&mut self, slot: &Installed, alarm: &Alarm) -> bool {
        loop {
            slot.arm();
            match self.look_at_commands() {
                Next::GoOn => {}
                Next::Stand => return false,
                Next::Quit => return true,
            }
            if let Err(reason) = self.step(slot, alarm) {
                tracing::error!(thread = self.thread, reason, "kvm.vcpu_failed");
                self.failed = Some(reason);
                return false;
            }
        }
    }

    fn look_at_commands(&mut self) -> Next {
        let early = self.early.take().ok_or(TryRecvError::Empty);
        match early.or_else(|_| self.commands.try_recv()) {
            Err(TryRecvError::Empty) | Ok(VcpuCommand::Run) => Next::GoOn,
            Err(TryRecvError::Disconnected) | Ok(VcpuCommand::Quit) => Next::Quit,
            Ok(command @ VcpuCommand::Stand(_)) => {
                self.obey(command);
                Next::Stand
            }
            Ok(command) => {
                self.obey(command);
                Next::GoOn
            }
        }
    }

    /// One `KVM_RUN` and its exit.
    fn step(&mut self, slot: &Installed, alarm: &Alarm) -> Result<(), String> {
        if !self.tell_found_bad()? {
            alarm.ring_in(ASK_AGAIN_AFTER);
        }
        self.pausing = false;
        match self.enter(slot) {
            Exit::Interrupted => Ok(()),
            Exit::Handled => self.finish(slot),
            Exit::Pause(time) => {
                self.finish(slot)?;
                self.pausing = true;
                if !self.waiting.is_empty() {
                    return Ok(());
                }
                match self.commands.recv_timeout(time) {
                    Ok(command) => self.early = Some(command),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => self.early = Some(VcpuCommand::Quit),
                }
                Ok(())
            }
            Exit::Poison(gpa, way) => {
                tracing::debug!(gpa, ?way, thread = self.thread, "kvm.poison_consumed");
                self.finish(slot)?;
                self.tell_consumed(self.shared.ram.block_at(gpa))
            }
            Exit::Failed(reason) => Err(reason),
        }
    }

    /// Lets KVM finish the instruction that exited, and no further one. An access in progress in user space, to a port or to
    /// supposed MMIO, is not part of the saved state, and forbids to set an exception.
    fn finish(&mut self, slot: &Installed) -> Result<(), String> {
        for _ in 0..64 {
            slot.finish_only();
            match self.enter(slot) {
                Exit::Interrupted => return Ok(()),
                // Another part of the same access.
                Exit::Poison(..) | Exit::Handled | Exit::Pause(_) => {}
                Exit::Failed(reason) => return Err(reason),
            }
        }
        Err("an exit does not finish".into())
    }

    fn enter(&mut self, slot: &Installed) -> Exit {
        slot.running(true);
        let exit = self.fd.run();
        slot.running(false);
        let regions = &self.shared.ram.regions;
        // Of all that can have happened, the SIGBUS comes first: it is the one that is told only once.
        if let Some(hva) = slot.take_poisoned() {
            return gpa_of(regions, hva).map_or(Exit::Interrupted, |gpa| Exit::Poison(gpa, Way::Signal));
        }
        let is_ram = |gpa: u64| hva_of(regions, gpa).is_some();
        match exit {
            Ok(VcpuExit::IoOut(PORT_HANDLED, _)) => Exit::Handled,
            Ok(VcpuExit::IoOut(PORT_PAUSE, data)) => Exit::Pause(pause(data)),
            Ok(VcpuExit::IoOut(PORT_FATAL, _)) => Exit::Failed("the guest had an exception, see its report".into()),
            Ok(VcpuExit::MmioRead(gpa, data)) if is_ram(gpa) => {
                data.fill(0xff);
                Exit::Poison(gpa, Way::Mmio)
            }
            Ok(VcpuExit::MmioWrite(gpa, _)) if is_ram(gpa) => Exit::Poison(gpa, Way::Mmio),
            Ok(VcpuExit::MemoryFault { gpa, .. }) if is_ram(gpa) => Exit::Poison(gpa, Way::MemoryFault),
            Ok(VcpuExit::Intr) => Exit::Interrupted,
            Ok(other) => Exit::Failed(format!("unexpected exit {other:?}")),
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => Exit::Interrupted,
            Err(error) => Exit::Failed(format!("KVM_RUN: {error}")),
        }
    }

    /// The guest can take one machine check at a time: another while `MCIP` is set would be a shutdown.
    fn is_busy(&self) -> Result<bool, String> {
        let status = read_msr(&self.fd, MSR_MCG_STATUS).ok_or("MCG_STATUS cannot be read")?;
        Ok(status & IN_PROGRESS != 0)
    }

    /// Whether the guest may be interrupted: in its workload, or in a pause, but not anywhere else in a handler. A row of
    /// machine checks would else pile up frames on the handler's stack; and on a host that emulates ring 0 (`kvm-pvm`,
    /// Linux 6.18) handlers that were interrupted at any instruction ended with #GP in `iretq`, their stack pointer wrong.
    fn is_interruptible(&self) -> Result<bool, String> {
        let rip = self.fd.get_regs().map_err(|error| format!("KVM_GET_REGS: {error}"))?.rip;
        Ok((self.pausing || !payload().is_handler(rip)) && !self.is_busy()?)
    }

    /// Tells the guest of the next page found bad, if there is one. False: it cannot take it now, ask again.
    fn tell_found_bad(&mut self) -> Result<bool, String> {
        let Some(block) = self.next_found_bad() else { return Ok(true) };
        if !self.is_interruptible()? {
            return Ok(false);
        }
        self.waiting.pop_front();
        self.give_found_bad(block)?;
        Ok(self.waiting.is_empty())
    }

    fn give_found_bad(&mut self, block: Block) -> Result<(), String> {
        self.inject(block, Severity::Optional)?;
        if self.shared.told().announce(block) {
            self.report(block, false);
        }
        Ok(())
    }

    fn next_found_bad(&mut self) -> Option<Block> {
        if self.waiting.is_empty() {
            return None;
        }
        let told = self.shared.told();
        self.waiting.retain(|block| !told.is_superfluous(*block));
        self.waiting.front().copied()
    }

    fn tell_consumed(&mut self, block: Block) -> Result<(), String> {
        if self.is_busy()? {
            return Err(format!("poison at {:#x} while a machine check was being handled", block.gpa));
        }
        if let Some(at) = self.waiting.iter().position(|waiting| *waiting == block) {
            // The AO was on its way and another vCPU may have taken it: the same error is not told twice. If the guest
            // does not keep off the page now, it stumbles again and takes the AR.
            self.waiting.remove(at);
            return self.give_found_bad(block);
        }
        self.inject(block, Severity::Required)?;
        self.shared.told().consumed(block);
        self.report(block, true);
        Ok(())
    }

    fn inject(&self, block: Block, severity: Severity) -> Result<(), String> {
        let check = machine_check(block, severity);
        // SAFETY: the ioctl reads a kvm_x86_mce.
        if unsafe { ioctl_with_ref(&self.fd, KVM_X86_SET_MCE(), &check) } < 0 {
            return Err(format!("KVM_X86_SET_MCE: {}", std::io::Error::last_os_error()));
        }
        Ok(())
    }

    fn report(&self, block: Block, action_required: bool) {
        // Nobody listens any more only while the machine is taken down.
        let _ = self.shared.errors.send(GuestMemoryError { block, action_required, thread: self.thread });
    }
}

fn pause(data: &[u8]) -> Duration {
    let micros = data.try_into().map_or(0, u32::from_le_bytes);
    Duration::from_micros(u64::from(micros))
}
