//! When a thread that nobody puts aside leaves its core to others: pure.
//!
//! A lane of the push that is received in place runs before every other thread of its core. A vCPU whose page has come may
//! wait for that very core, so the lane rests: often while the guest asks for pages, seldom while it does not.

use std::time::{Duration, Instant};

/// How long a rest is.
pub const PAUSE: Duration = Duration::from_micros(150);
/// How long it works between two rests while the guest faults.
const RUN_TIME: Duration = Duration::from_micros(500);
/// The same while it does not: somebody may want the core all the same.
const RUN_TIME_QUIET_GUEST: Duration = Duration::from_millis(2);
/// A guest that has not faulted for so long is quiet.
const QUIET_AFTER: Duration = Duration::from_millis(20);

/// What a lane has done since it rested.
#[derive(Debug, Default)]
pub struct RtThrottle {
    /// When the first frame since the last rest was taken; later by what it slept since.
    began: Option<Instant>,
    fault: Option<Instant>,
}

impl RtThrottle {
    /// The guest touched an absent page.
    pub fn note_fault(&mut self, now: Instant) {
        self.fault = Some(now);
    }

    /// It slept, since there was nothing to do: no work, and a rest if it was as long.
    pub fn note_sleep(&mut self, time: Duration) {
        self.began = self.began.filter(|_| time < PAUSE).map(|began| began + time);
    }

    /// A frame of the push was taken: whether to rest for [`PAUSE`].
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
