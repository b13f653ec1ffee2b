//! The scheduling classes of the pager's threads. A vCPU waits for the urgent path; no thread waits for the bulk path.

use crate::sys::scheduling::{SchedulingClass, enter};

/// Nice value (sched(7)) of the threads between a fault and its resolution.
const FAVOURED_NICE: i32 = -15;
/// Their time slice. A thread with a short slice runs before others when it wakes.
const FAVOURED_SLICE_NS: u64 = 100_000;
/// The lowest real-time priority: before every fair thread, behind all other real-time threads.
const LOWEST_REALTIME: u32 = 1;

/// The calling thread serves faults. Returns false without `CAP_SYS_NICE`: the thread is slower under load then, not wrong.
pub fn favoured() -> bool {
    apply(SchedulingClass::Fair { nice: FAVOURED_NICE, slice_ns: FAVOURED_SLICE_NS })
}

/// The calling thread runs as soon as it wakes, before all threads that are not real-time, and until it sleeps (`SCHED_RR`):
/// it must sleep soon. Returns false, and nothing has changed, without `CAP_SYS_NICE`, or in a version 1 control group that
/// has no real-time budget.
pub fn realtime() -> bool {
    apply(SchedulingClass::RealTime { priority: LOWEST_REALTIME })
}

/// The calling thread sends in bulk: it takes its share, but preempts nobody when it wakes. Its nice value stays that of the
/// vCPUs: behind them it would starve, and the guest would have to request every page by itself.
pub fn batch() {
    apply(SchedulingClass::Batch);
}

/// Lets the other threads of this CPU run first. Bulk threads call it after each frame: a vCPU that has used up its share
/// preempts nobody when its page comes, and would wait for the next tick. Spinning threads call it too: the work that they
/// wait for may have to be done on their CPU.
pub fn yield_cpu() {
    std::thread::yield_now();
}

fn apply(class: SchedulingClass) -> bool {
    enter(class).inspect_err(|error| tracing::debug!(%error, ?class, "thread.priority_kept")).is_ok()
}

#[cfg(test)]
mod tests;
