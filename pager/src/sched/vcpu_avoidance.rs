//! Keeps a thread that goes before all others off the CPU of a vCPU that asks for pages: it would put that aside again and
//! again, and a page that has come would be of no use to it.

use std::time::{Duration, Instant};

use crate::sched::cpu_set::CpuSet;
use crate::sys::procfs::stat_field;

/// How often it is looked where the vCPU is.
const AFFINITY_POLL: Duration = Duration::from_millis(5);

/// Where the calling thread runs, if it is not where it may.
#[derive(Debug)]
pub struct VcpuAvoidance {
    vmm: u32,
    allowed: CpuSet,
    avoided: Option<usize>,
    checked: Option<Instant>,
}

impl VcpuAvoidance {
    /// Of the calling thread, beside the vCPUs of this process.
    pub fn new(vmm: u32) -> Self {
        Self { vmm, allowed: CpuSet::allowed(), avoided: None, checked: None }
    }

    /// This thread of the VMM has asked for a page. Where there is only one CPU, or it is not known which one that thread runs
    /// on, nothing changes.
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

    /// The thread goes before nobody any more.
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
