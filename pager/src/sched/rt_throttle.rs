//! Decides when a real-time bulk thread pauses, so that other threads can run: pure.
//!
//! A bulk thread that receives in place runs before every other thread of its core. A vCPU that has its page may need that
//! core. So the thread pauses often while the guest faults, and seldom otherwise.

use std::time::{Duration, Instant};

/// Length of a pause.
pub const PAUSE: Duration = Duration::from_micros(150);
/// Work between two pauses while the guest faults.
const RUN_TIME: Duration = Duration::from_micros(500);
/// The same while it does not fault: other threads may need the core all the same.
const RUN_TIME_QUIET_GUEST: Duration = Duration::from_millis(2);
/// A guest without a fault for this long is quiet.
const QUIET_AFTER: Duration = Duration::from_millis(20);

/// The work of a lane since its last pause.
#[derive(Debug, Default)]
pub struct RtThrottle {
    /// Start of the work since the last pause, later by the time slept since.
    began: Option<Instant>,
    fault: Option<Instant>,
}

impl RtThrottle {
    /// The guest touched an absent page.
    pub fn note_fault(&mut self, now: Instant) {
        self.fault = Some(now);
    }

    /// The thread slept for lack of work. That counts as a pause if it was as long as one.
    pub fn note_sleep(&mut self, time: Duration) {
        self.began = self.began.filter(|_| time < PAUSE).map(|began| began + time);
    }

    /// A frame was received: whether to sleep for [`PAUSE`].
    pub fn pause_due(&mut self, now: Instant) -> bool {
        let quiet = self.fault.is_none_or(|fault| now.saturating_duration_since(fault) >= QUIET_AFTER);
        let worked = now.saturating_duration_since(*self.began.get_or_insert(now));
        if worked < if quiet { RUN_TIME_QUIET_GUEST } else { RUN_TIME } {
            return false;
        }
        self.began = None;
        true
    }
}

#[cfg(test)]
mod tests;
