//! The thread of a bulk lane: its scheduling class, and when it pauses.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::destination::pages::shared_pages::SharedPages;
use crate::sched::priority;
use crate::sched::rt_throttle::{PAUSE, RtThrottle};
use crate::sched::vcpu_avoidance::VcpuAvoidance;

/// The scheduling class of the thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadClass {
    /// Real-time, with pauses.
    RealTime,
    /// Favoured.
    Favoured,
    /// Fair; it yields after each frame.
    Fair,
}

/// Chooses the class. A lane that receives in place mostly waits for the source, so it may be real-time during a heavy
/// push. A lane that copies its pages would keep other threads from its core without end. A light push needs no class.
#[derive(Debug)]
pub struct BulkThread {
    real_time: bool,
    /// The ground of the present class: whether the thread may be real-time, and whether it receives in place.
    basis: (bool, bool),
    class: ThreadClass,
    throttle: RtThrottle,
    shared: Arc<SharedPages>,
    faults: u64,
    /// The end of the accounted time.
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

    /// Accounts for the time until now; the thread slept for so much of it.
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
