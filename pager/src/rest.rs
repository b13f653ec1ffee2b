//! When a thread that nobody puts aside leaves its core to others: pure.
//!
//! The page path of a push runs before every other thread of its core. A vCPU whose page has come may wait for that very core,
//! so the page path rests: often while the guest asks for pages, seldom while it does not.

use std::time::{Duration, Instant};

/// How long a rest is.
pub const REST: Duration = Duration::from_micros(150);
/// Frames of the push between two rests while the guest faults: a quarter of a millisecond of work.
const FRAMES: u32 = 4;
/// The same while it does not: somebody may want the core all the same.
const FRAMES_OF_A_QUIET_GUEST: u32 = 24;
/// A guest that has not faulted for so long is quiet.
const QUIET: Duration = Duration::from_millis(20);
/// One rest of so many is a whole one: vCPUs that fault without end cannot keep the core from those that do not.
const WHOLE: u32 = 8;

/// What to do after a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rest {
    /// Go on.
    None,
    /// Rest until something urgent comes, for [`REST`] at most.
    UntilUrgent,
    /// Rest for [`REST`].
    Whole,
}

/// What the page path has done since it rested.
#[derive(Debug, Default)]
pub struct Rests {
    frames: u32,
    rests: u32,
    fault: Option<Instant>,
}

impl Rests {
    /// The guest touched an absent page.
    pub fn fault(&mut self, now: Instant) {
        self.fault = Some(now);
    }

    /// A frame of the push was taken.
    pub fn after_frame(&mut self, now: Instant) -> Rest {
        self.frames += 1;
        let quiet = self.fault.is_none_or(|fault| now.saturating_duration_since(fault) >= QUIET);
        if self.frames < if quiet { FRAMES_OF_A_QUIET_GUEST } else { FRAMES } {
            return Rest::None;
        }
        self.frames = 0;
        self.rests = (self.rests + 1) % WHOLE;
        if self.rests == 0 { Rest::Whole } else { Rest::UntilUrgent }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Frames up to a rest, each a tenth of a millisecond after the last.
    fn frames(rests: &mut Rests, now: &mut Instant, faults: bool) -> u32 {
        for frame in 1..1000 {
            *now += Duration::from_micros(100);
            if faults {
                rests.fault(*now);
            }
            if rests.after_frame(*now) != Rest::None {
                return frame;
            }
        }
        panic!("it never rests");
    }

    #[test]
    fn it_rests_often_beside_a_guest_that_faults_and_now_and_then_beside_any() {
        let (mut rests, mut now) = (Rests::default(), Instant::now());
        assert_eq!(frames(&mut rests, &mut now, false), FRAMES_OF_A_QUIET_GUEST);
        assert_eq!(frames(&mut rests, &mut now, true), FRAMES);
        assert_eq!(frames(&mut rests, &mut now, false), FRAMES, "it faulted a moment ago");
        now += QUIET;
        assert_eq!(frames(&mut rests, &mut now, false), FRAMES_OF_A_QUIET_GUEST);
    }

    #[test]
    fn of_many_rests_some_are_whole() {
        let (mut rests, now) = (Rests::default(), Instant::now());
        let taken: Vec<_> = (0..10_000).map(|_| rests.after_frame(now)).filter(|rest| *rest != Rest::None).collect();
        let whole = taken.iter().filter(|rest| **rest == Rest::Whole).count();
        assert_eq!(whole, taken.len() / WHOLE as usize);
    }
}
