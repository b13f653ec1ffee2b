//! Keeps a real-time bulk thread off the CPU of the vCPU that is faulting. On the same CPU it would preempt the vCPU, which
//! then could not use the page that it has just received.

use std::time::{Duration, Instant};

use crate::sched::cpu_set::CpuSet;
use crate::sys::procfs::stat_field;

/// Period of a look at the vCPU's CPU.
const AFFINITY_POLL: Duration = Duration::from_millis(5);

/// The narrowed affinity of the calling thread, if it is narrowed.
#[derive(Debug)]
pub struct VcpuAvoidance {
    vmm: u32,
    allowed: CpuSet,
    avoided: Option<usize>,
    checked: Option<Instant>,
}

impl VcpuAvoidance {
    /// For the calling thread, and the vCPUs of this process.
    pub fn new(vmm: u32) -> Self {
        Self { vmm, allowed: CpuSet::allowed(), avoided: None, checked: None }
    }

    /// This thread of the VMM has faulted. Nothing changes if there is one CPU, or if that thread's CPU is not known.
    pub fn step(&mut self, now: Instant, vcpu: u32) {
        if self.checked.is_some_and(|checked| now.saturating_duration_since(checked) < AFFINITY_POLL) {
            return;
        }
        self.checked = Some(now);
        let cpu = cpu_of(self.vmm, vcpu);
        if cpu == self.avoided {
            return;
        }
        self.avoided = cpu;
        cpu.map_or_else(|| self.allowed.clone(), |cpu| self.allowed.without(cpu)).pin();
    }

    /// The thread is no longer real-time: it gets its whole affinity back.
    pub fn end(&mut self) {
        if self.avoided.take().is_some() {
            self.allowed.pin();
        }
    }
}

/// The CPU on which a thread of a process ran last (proc_pid_stat(5), `processor`).
fn cpu_of(process: u32, thread: u32) -> Option<usize> {
    usize::try_from(stat_field(&format!("/proc/{process}/task/{thread}"), 39)?).ok()
}

#[cfg(test)]
mod tests;
