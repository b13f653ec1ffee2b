//! CPU time and waiting times, as the kernel counts them.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// CPU time of the calling thread.
pub fn thread_time() -> Duration {
    time_of(ClockId::ThreadCPUTime)
}

/// CPU time of all threads of this process.
pub fn process_time() -> Duration {
    time_of(ClockId::ProcessCPUTime)
}

/// How long the calling thread has waited for a CPU (`run_delay` in /proc/thread-self/schedstat,
/// Documentation/scheduler/sched-stats.rst, Linux); 0 if the kernel does not count it.
pub fn thread_waited() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    Duration::from_nanos(stat.split_whitespace().nth(1).and_then(|field| field.parse().ok()).unwrap_or(0))
}

/// Idle time of all CPUs of this host together (/proc/uptime, proc_uptime(5)), in steps of 10 ms; 0 if the kernel does not
/// count it.
pub fn host_idle() -> Duration {
    let uptime = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = uptime.split_whitespace().nth(1).and_then(|field| field.parse().ok()).unwrap_or(0.0);
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}

fn time_of(clock: ClockId) -> Duration {
    clock_gettime(clock).try_into().unwrap_or_default()
}
