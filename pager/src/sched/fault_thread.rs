//! The scheduling of the fault thread: real-time during a heavy push, otherwise favoured and spinning.

use std::time::{Duration, Instant};

use crate::sched::adaptive_spin::AdaptiveSpin;
use crate::sched::cpu_set::CpuSet;
use crate::sched::priority;
use crate::sched::push_load::PushLoad;

/// A reply is sure to come and a fault is not, so the thread spins this many times longer for a reply.
const REPLY_FACTOR: u32 = 3;

/// The scheduling state of the calling thread.
#[derive(Debug)]
pub struct FaultThread {
    /// Whether the operator allows the real-time class.
    real_time: bool,
    while_requested: AdaptiveSpin,
    while_idle: AdaptiveSpin,
    /// `None` while no bulk lane is open.
    push: Option<PushLoad>,
    is_heavy: bool,
    is_realtime: bool,
}

impl FaultThread {
    /// Makes the calling thread the fault thread: favoured, and on the given CPUs. It spins for at most `spin` before it sleeps.
    pub fn enter(cpus: &CpuSet, spin: Duration, real_time: bool) -> Self {
        priority::favoured();
        cpus.pin();
        Self {
            real_time,
            while_requested: AdaptiveSpin::new(spin * REPLY_FACTOR),
            while_idle: AdaptiveSpin::new(spin),
            push: None,
            is_heavy: false,
            is_realtime: false,
        }
    }

    /// Whether the thread is real-time: it then neither yields nor spins, since it would keep others from its CPU.
    pub fn is_realtime(&self) -> bool {
        self.is_realtime
    }

    /// Enters the class that the push calls for. `worked` is the CPU time of all bulk lanes so far; `None`: none is open.
    /// Returns the push's weight (true: heavy) if it has changed.
    pub fn update_class(&mut self, worked: Option<Duration>) -> Option<bool> {
        let heavy = match worked {
            Some(worked) => {
                let now = Instant::now();
                self.push.get_or_insert_with(|| PushLoad::new(now, worked)).is_heavy(now, worked)
            }
            None => {
                self.push = None;
                false
            }
        };
        if heavy == self.is_heavy {
            return None;
        }
        self.is_heavy = heavy;
        self.is_realtime = heavy && self.real_time && priority::realtime();
        if !heavy {
            priority::favoured();
        }
        Some(heavy)
    }

    /// Lets other threads of this CPU run first: the source may have to read the page here, or a woken vCPU may wait here.
    pub fn yield_cpu(&self) {
        if !self.is_realtime {
            priority::yield_cpu();
        }
    }

    /// Whether to look again at once after a look that found nothing. `requested`: a reply is due.
    pub fn should_spin(&mut self, requested: bool) -> bool {
        let spin = if requested { &mut self.while_requested } else { &mut self.while_idle };
        !self.is_realtime && spin.should_spin(Instant::now())
    }

    /// The last look found work.
    pub fn found_work(&mut self) {
        self.while_requested.found_work();
        self.while_idle.found_work();
    }
}
