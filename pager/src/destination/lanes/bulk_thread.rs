//! The thread of a bulk lane: its scheduling class, and when it pauses.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::destination::pages::shared_pages::SharedPages;
use crate::sched::priority;
use crate::sched::rt_throttle::{PAUSE, RtThrottle};
use crate::sched::vcpu_avoidance::VcpuAvoidance;

/// How the thread stands against the others for a core.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadClass {
    /// Before all; it rests.
    RealTime,
    /// Favoured.
    Favoured,
    /// As any other; it gives way.
    Fair,
}

/// A lane that is received in place mostly waits for the source, so it may go before all others; one whose pages have to be
/// copied would keep them from its core without end. Where the push is light nobody is in its way.
#[derive(Debug)]
pub struct BulkThread {
    real_time: bool,
    /// Whether it may go before others, and is received in place, by which it stands as it does.
    basis: (bool, bool),
    class: ThreadClass,
    throttle: RtThrottle,
    shared: Arc<SharedPages>,
    faults: u64,
    /// Until when its work is accounted for.
    accounted: Instant,
    avoidance: VcpuAvoidance,
}

impl BulkThread {
    /// Enters the class that the push calls for.
    pub fn new(real_time: bool, shared: Arc<SharedPages>) -> Self {
        let (faults, accounted) = (shared.faults(), Instant::now());
        let basis = (real_time && shared.is_heavy(), false);
        let avoidance = VcpuAvoidance::new(shared.lock().table().bound_to());
        Self {
            real_time,
            basis,
            class: Self::take(basis),
            throttle: RtThrottle::default(),
            shared,
            faults,
            accounted,
            avoidance,
        }
    }

    fn take((ahead, in_place): (bool, bool)) -> ThreadClass {
        if ahead && in_place && priority::realtime() {
            return ThreadClass::RealTime;
        }
        if ahead && priority::favoured() {
            return ThreadClass::Favoured;
        }
        priority::batch();
        ThreadClass::Fair
    }

    /// Until now, of which it slept so long.
    pub fn slept(&mut self, time: Duration) {
        self.throttle.note_sleep(time);
        self.account(Instant::now(), time);
    }

    fn account(&mut self, now: Instant, slept: Duration) {
        self.shared.note_work(now.saturating_duration_since(self.accounted).saturating_sub(slept));
        self.accounted = now;
    }

    /// After a frame.
    pub fn after_frame(&mut self, in_place: bool) {
        let now = Instant::now();
        self.account(now, Duration::ZERO);
        let basis = (self.real_time && self.shared.is_heavy(), in_place);
        if basis != self.basis {
            (self.basis, self.class) = (basis, Self::take(basis));
            self.avoidance.end();
        }
        match self.class {
            ThreadClass::RealTime => {
                let faults = self.shared.faults();
                if faults != self.faults {
                    self.faults = faults;
                    self.throttle.note_fault(now);
                    self.avoidance.step(now, self.shared.faulting_thread());
                }
                if self.throttle.pause_due(now) {
                    std::thread::sleep(PAUSE);
                    self.accounted = Instant::now();
                }
            }
            ThreadClass::Favoured => {}
            ThreadClass::Fair => priority::yield_cpu(),
        }
    }
}
