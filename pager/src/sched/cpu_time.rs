//! What time the kernel has given to threads.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Processor's time that the calling thread has had.
pub fn thread_time() -> Duration {
    time_of(ClockId::ThreadCPUTime)
}

/// Processor's time that all threads of this process have had.
pub fn process_time() -> Duration {
    time_of(ClockId::ProcessCPUTime)
}

/// How long the calling thread has waited for a processor (`run_delay` in /proc/thread-self/schedstat,
/// Documentation/scheduler/sched-stats.rst, Linux); 0 where the kernel does not tell.
pub fn thread_waited() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    Duration::from_nanos(stat.split_whitespace().nth(1).and_then(|field| field.parse().ok()).unwrap_or(0))
}

/// How long all processors of this host together have been idle (/proc/uptime, proc_uptime(5)), in steps of 10 ms; 0 where
/// the kernel does not tell.
pub fn host_idle() -> Duration {
    let uptime = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = uptime.split_whitespace().nth(1).and_then(|field| field.parse().ok()).unwrap_or(0.0);
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}

fn time_of(clock: ClockId) -> Duration {
    clock_gettime(clock).try_into().unwrap_or_default()
}
