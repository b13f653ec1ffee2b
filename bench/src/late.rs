//! Measures how late the machine wakes a thread that competes with no other.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use vmferry_pager::internals::CpuSet;

/// A thread wakes so often.
const EVERY: Duration = Duration::from_millis(1);
/// Wakes that are later than this are counted.
const LATE: Duration = Duration::from_millis(1);
/// Above all others, below the kernel's own (sched(7)).
const PRIORITY: libc::c_int = 50;

/// Of one thread on each CPU.
#[derive(Debug, Default, PartialEq, Serialize)]
pub struct Lateness {
    /// How long it was looked at.
    seconds: f64,
    /// CPUs.
    cpus: usize,
    /// Whether the threads were real-time; otherwise the work of other processes is in it.
    real_time: bool,
    /// Of all CPUs.
    longest_ms: f64,
    /// Wakes that were more than 1 ms late, of all CPUs.
    over_1_ms: u64,
}

/// Sleeps on every CPU that this process may use for `seconds`, again and again.
///
/// # Errors
/// No thread can be started.
pub fn measure(seconds: u64) -> io::Result<Lateness> {
    let length = Duration::from_secs(seconds);
    let start = |cpu: CpuSet| thread::Builder::new().spawn(move || on_cpu(&cpu, length));
    let threads: Vec<_> = CpuSet::each_allowed().into_iter().map(start).collect::<io::Result<_>>()?;
    let (seconds, cpus) = (length.as_secs_f64(), threads.len());
    let mut all = Lateness { seconds, cpus, real_time: true, ..Lateness::default() };
    for thread in threads {
        let (late, real_time) = thread.join().map_err(|_| io::Error::other("a thread panicked"))?;
        all.add(&late, real_time);
    }
    Ok(all)
}

impl Lateness {
    fn add(&mut self, late: &[Duration], real_time: bool) {
        let longest = late.iter().max().copied().unwrap_or_default();
        self.longest_ms = self.longest_ms.max(longest.as_secs_f64() * 1e3);
        self.over_1_ms += late.iter().filter(|late| **late > LATE).count() as u64;
        self.real_time &= real_time;
    }
}

fn on_cpu(cpu: &CpuSet, length: Duration) -> (Vec<Duration>, bool) {
    cpu.pin();
    let urgent = libc::sched_param { sched_priority: PRIORITY };
    // SAFETY: a whole sched_param; 0 is the calling thread.
    let real_time = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const urgent) } == 0;
    let mut late = Vec::with_capacity((length.as_millis() / EVERY.as_millis()) as usize + 1);
    let (end, mut next) = (Instant::now() + length, Instant::now());
    while next < end {
        next += EVERY;
        thread::sleep(next.saturating_duration_since(Instant::now()));
        let woken = Instant::now();
        late.push(woken.saturating_duration_since(next));
        next = woken;
    }
    (late, real_time)
}

#[cfg(test)]
mod tests;
