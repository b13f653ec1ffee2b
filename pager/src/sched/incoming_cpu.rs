//! Keeps the thread of an urgent lane on the CPU that receives its connection's packets (`SO_INCOMING_CPU`). That CPU is awake
//! when a request arrives; any other would have to wake first, or leave its work.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use rustix::net::sockopt::socket_incoming_cpu;

use crate::sched::cpu_set::CpuSet;
use crate::sched::cpu_time::{host_idle, process_time, thread_time, thread_waited};
use crate::sched::push_load::PushLoad;

/// One request of this many is sampled: work behind a reply may delay the thread that waits for it.
const SAMPLE_EVERY: u32 = 4;
/// It moves once this many samples in a row came by another CPU.
const MOVE_AFTER: u32 = 8;
/// How often it checks whether CPUs are crowded.
const CROWDING_POLL: Duration = Duration::from_millis(200);
/// CPUs are crowded if the thread waited for one this large a part of the time, in percent.
const MAX_WAIT_PERCENT: u128 = 20;
/// They are crowded too if all of them together were idle for less than this part of one CPU, in percent.
const MIN_IDLE_PERCENT: u128 = 10;
/// How long it runs anywhere once CPUs are crowded.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// Places the calling thread: during a light push on the CPU of its packets, unless CPUs are crowded; else anywhere.
#[derive(Debug)]
pub struct FollowIncomingCpu {
    allowed: CpuSet,
    at: Option<usize>,
    /// Requests since the last sample.
    passed: u32,
    /// CPU of the last sample, and how many in a row came by it.
    latest: (usize, u32),
    /// The load of the other threads of this process.
    push: PushLoad,
    checked: Instant,
    waited: Duration,
    idle: Duration,
    /// When it may follow again; `None`: the push is heavy.
    follow_from: Option<Instant>,
}

impl FollowIncomingCpu {
    /// Follows for the calling thread.
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

    /// A request of this lane was answered.
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

/// The CPU that received the last packet of a connection (socket(7), `SO_INCOMING_CPU`).
fn incoming_cpu(lane: &TcpStream) -> Option<usize> {
    socket_incoming_cpu(lane).ok().and_then(|cpu| usize::try_from(cpu).ok())
}

#[cfg(test)]
mod tests;
