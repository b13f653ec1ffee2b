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
mod tests {
    use super::*;

    /// From a frame to the rest behind it, frames being a tenth of a millisecond apart.
    fn work(throttle: &mut RtThrottle, now: &mut Instant, faults: bool) -> Duration {
        let began = *now;
        for _ in 1..1000 {
            if faults {
                throttle.note_fault(*now);
            }
            if throttle.pause_due(*now) {
                return *now - began;
            }
            *now += Duration::from_micros(100);
        }
        panic!("it never rests");
    }

    #[test]
    fn it_rests_often_beside_a_guest_that_faults_and_now_and_then_beside_any() {
        let (mut throttle, mut now) = (RtThrottle::default(), Instant::now());
        assert_eq!(work(&mut throttle, &mut now, false), RUN_TIME_QUIET_GUEST);
        assert_eq!(work(&mut throttle, &mut now, true), RUN_TIME);
        assert_eq!(work(&mut throttle, &mut now, false), RUN_TIME, "it faulted a moment ago");
        now += QUIET_AFTER;
        assert_eq!(work(&mut throttle, &mut now, false), RUN_TIME_QUIET_GUEST);
    }

    #[test]
    fn sleep_is_no_work_and_enough_of_it_is_a_rest() {
        for (sleep, frames_to_a_rest) in [(PAUSE / 3, Some(6)), (PAUSE, None)] {
            let (mut throttle, mut now) = (RtThrottle::default(), Instant::now());
            let mut frames = (1..1000).map(|frame| {
                throttle.note_fault(now);
                let rest = throttle.pause_due(now);
                now += Duration::from_micros(100);
                throttle.note_sleep(sleep);
                now += sleep;
                (frame, rest)
            });
            let rested = frames.find(|(_, rest)| *rest).map(|(frame, _)| frame);
            assert_eq!(rested, frames_to_a_rest, "{sleep:?}");
        }
    }
}
