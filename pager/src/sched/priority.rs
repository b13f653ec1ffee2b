//! How a thread stands against the others for a core: a vCPU waits for the urgent path, nobody for the bulk path.

use std::io;

/// Nice value (sched(7)) of the threads between a fault and its resolution.
const FAVOURED_NICE: i32 = -15;
/// Their time slice, in nanoseconds: a thread that wants little and wants it soon is put before others when it wakes
/// (`sched_runtime` of a fair thread, Linux 6.12; earlier kernels do not look at it).
const FAVOURED_SLICE_NS: u64 = 100_000;
/// Before every fair thread, behind all that is real-time otherwise.
const LOWEST_REALTIME: u32 = 1;
/// Threads that are started later do not inherit how this one stands (`SCHED_FLAG_RESET_ON_FORK`).
const RESET_ON_FORK: u64 = 1;

/// `struct sched_attr` (sched_setattr(2)).
#[repr(C)]
#[derive(Debug, Default)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
    util_min: u32,
    util_max: u32,
}

/// The calling thread serves faults. Without `CAP_SYS_NICE` (`EPERM`) it is not put before others: slower under load, not
/// wrong, and this returns false.
pub fn favoured() -> bool {
    apply(&Attributes {
        flags: RESET_ON_FORK,
        nice: FAVOURED_NICE,
        runtime: FAVOURED_SLICE_NS,
        ..Attributes::default()
    })
}

/// The calling thread runs as soon as it wakes, before all threads that are not real-time, and until it sleeps (`SCHED_RR`,
/// sched(7)): it must sleep soon. Returns false where it may not (`EPERM`: it wants `CAP_SYS_NICE`; a control group of
/// Linux before version 2 may have no time for it): then nothing has changed.
pub fn realtime() -> bool {
    let (policy, priority) = (libc::SCHED_RR as u32, LOWEST_REALTIME);
    apply(&Attributes { policy, flags: RESET_ON_FORK, priority, ..Attributes::default() })
}

/// The calling thread sends in bulk: it takes its share, but puts nobody aside when it wakes. Its nice value stays that of
/// the vCPUs: behind them it would starve, and the guest would have to ask for every page by itself.
pub fn batch() {
    apply(&Attributes { policy: libc::SCHED_BATCH as u32, ..Attributes::default() });
}

/// Whoever waits for this core may go first. Bulk says so after every frame: a thread that has run for more than its share
/// puts nobody aside when it wakes, and a vCPU whose page has come would wait for the next tick of the clock, up to 4 ms.
/// So does a thread that spins: what it spins for may have to be done on its core, by a vCPU that it has just woken.
pub fn yield_cpu() {
    std::thread::yield_now();
}

fn apply(attributes: &Attributes) -> bool {
    let attributes = Attributes { size: size_of::<Attributes>() as u32, ..*attributes };
    // SAFETY: a struct of the size that it says; 0 is the calling thread.
    let done = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) } == 0;
    if !done {
        tracing::debug!(error = %io::Error::last_os_error(), "thread.priority_kept");
    }
    done
}

#[cfg(test)]
mod tests;
