//! Whether to look again and again for a while, or to sleep at once: a sleeping thread takes tens of microseconds to
//! wake, a spinning one takes a core from somebody. Spinning is tried as long as it finds something often enough.

use std::time::{Duration, Instant};

/// Out of 256: below it spinning is tried only at intervals.
const MIN_HIT_RATE: u32 = 64;
/// One try of so many, where it was not worth it.
const RETRY_EVERY: u32 = 16;

/// The time to spin, and how often that found something of late.
#[derive(Debug)]
pub struct AdaptiveSpin {
    longest: Duration,
    /// Of 256, moving by an eighth.
    found: u32,
    tries: u32,
    since: Option<Instant>,
}

impl AdaptiveSpin {
    /// Zero: never.
    pub fn new(longest: Duration) -> Self {
        Self { longest, found: 256, tries: 0, since: None }
    }

    /// Nothing was there: whether to look again at once.
    pub fn should_spin(&mut self, now: Instant) -> bool {
        let since = match self.since {
            Some(since) => since,
            None => {
                self.tries = self.tries.wrapping_add(1);
                if self.longest.is_zero() || (self.found < MIN_HIT_RATE && !self.tries.is_multiple_of(RETRY_EVERY)) {
                    return false;
                }
                *self.since.insert(now)
            }
        };
        if now.saturating_duration_since(since) < self.longest {
            return true;
        }
        self.found -= self.found / 8;
        self.since = None;
        false
    }

    /// Something was there.
    pub fn found_work(&mut self) {
        if self.since.take().is_some() {
            self.found += (256 - self.found) / 8;
        }
    }
}

#[cfg(test)]
mod tests;
