//! Keeps the thread of an urgent lane on the CPU on which its connection's packets are received: that one is awake when an ask
//! comes, and any other would have to be woken, or leave what it does.

use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use crate::sched::cpu_set::CpuSet;
use crate::sched::cpu_time::{host_idle, process_time, thread_time, thread_waited};
use crate::sched::push_load::PushLoad;

/// One ask of so many is looked at: what comes behind an answer may hold up who waits for it.
const SAMPLE_EVERY: u32 = 4;
/// It moves once so many of those in a row have come by way of another CPU.
const MOVE_AFTER: u32 = 8;
/// How often it is looked whether it is worth it.
const CROWDING_POLL: Duration = Duration::from_millis(200);
/// It is not, where the thread waited for a CPU for so many percent of the time.
const MAX_WAIT_PERCENT: u128 = 20;
/// Nor where all CPUs of the host together were idle for less than so many percent of one: then each has enough to do.
const MIN_IDLE_PERCENT: u128 = 10;
/// For so long it is not tried again then.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// Where the calling thread runs: beside a light push where its packets come, unless others want that CPU; else anywhere.
#[derive(Debug)]
pub struct FollowIncomingCpu {
    allowed: CpuSet,
    at: Option<usize>,
    /// Asks since one was looked at.
    passed: u32,
    /// By which CPU the last of those came, and how many of them.
    latest: (usize, u32),
    /// Work of the other threads of this process.
    push: PushLoad,
    checked: Instant,
    waited: Duration,
    idle: Duration,
    /// From then on; none: the push is heavy.
    follow_from: Option<Instant>,
}

impl FollowIncomingCpu {
    /// Of the calling thread.
    pub fn new(now: Instant) -> Self {
        Self::begin(now, thread_waited(), others_worked(), host_idle())
    }

    fn begin(now: Instant, waited: Duration, worked: Duration, idle: Duration) -> Self {
        let push = PushLoad::new(now, worked);
        Self {
            allowed: CpuSet::allowed(),
            at: None,
            passed: 0,
            latest: (0, 0),
            push,
            checked: now,
            waited,
            idle,
            follow_from: None,
        }
    }

    /// An ask that came on this lane is answered.
    pub fn step(&mut self, lane: &TcpStream) {
        self.passed += 1;
        if self.passed < SAMPLE_EVERY {
            return;
        }
        self.passed = 0;
        let now = Instant::now();
        if now.saturating_duration_since(self.checked) >= CROWDING_POLL {
            self.check_crowding(now, thread_waited(), others_worked(), host_idle());
        }
        if self.follow_from.is_some_and(|from| now >= from)
            && let Some(cpu) = incoming_cpu(lane)
        {
            self.came_by(cpu);
        }
    }

    fn came_by(&mut self, cpu: usize) {
        self.latest = (cpu, if self.latest.0 == cpu { self.latest.1 + 1 } else { 1 });
        if self.latest.1 != MOVE_AFTER || self.at == Some(cpu) {
            return;
        }
        let only = self.allowed.only(cpu);
        if only != CpuSet::default() {
            only.pin();
            self.at = Some(cpu);
        }
    }

    fn check_crowding(&mut self, now: Instant, waited: Duration, worked: Duration, idle: Duration) {
        let time = now.saturating_duration_since(self.checked).as_nanos();
        let crowded = waited.saturating_sub(self.waited).as_nanos() * 100 >= time * MAX_WAIT_PERCENT
            || idle.saturating_sub(self.idle).as_nanos() * 100 < time * MIN_IDLE_PERCENT;
        (self.checked, self.waited, self.idle) = (now, waited, idle);
        self.follow_from = match self.push.is_heavy(now, worked) {
            true => None,
            false if crowded => Some(now + RETRY_DELAY),
            false => self.follow_from.or(Some(now)),
        };
        if self.follow_from.is_none_or(|from| now < from) && self.at.take().is_some() {
            self.allowed.pin();
            self.latest.1 = 0;
        }
    }
}

fn others_worked() -> Duration {
    process_time().saturating_sub(thread_time())
}

/// The CPU on which the kernel received what came last on a connection (socket(7), `SO_INCOMING_CPU`).
fn incoming_cpu(lane: &TcpStream) -> Option<usize> {
    let (mut cpu, mut size) = (-1, size_of::<libc::c_int>() as libc::socklen_t);
    let (level, what, value) = (libc::SOL_SOCKET, libc::SO_INCOMING_CPU, (&raw mut cpu).cast());
    // SAFETY: room for an int, of the size that is said.
    let told = unsafe { libc::getsockopt(lane.as_raw_fd(), level, what, value, &raw mut size) } == 0;
    usize::try_from(cpu).ok().filter(|_| told)
}

#[cfg(test)]
mod tests;
