//! Decides whether a thread polls for a while before it sleeps. A sleeping thread wakes slowly, and a spinning one takes a CPU
//! from another thread. So a thread spins as long as spinning finds work often enough. Pure.

use std::time::{Duration, Instant};

/// Out of 256: below it spinning is tried only at intervals.
const MIN_HIT_RATE: u32 = 64;
/// One wait of this many is tried where spinning found nothing.
const RETRY_EVERY: u32 = 16;

/// The longest spin, and the recent hit rate.
#[derive(Debug)]
pub struct AdaptiveSpin {
    longest: Duration,
    /// Hit rate of 256; each wait moves it by an eighth.
    found: u32,
    tries: u32,
    since: Option<Instant>,
}

impl AdaptiveSpin {
    /// Spins for at most `longest`; zero: never.
    pub fn new(longest: Duration) -> Self {
        Self { longest, found: 256, tries: 0, since: None }
    }

    /// A look found nothing. Returns whether to look again at once.
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

    /// A look found work.
    pub fn found_work(&mut self) {
        if self.since.take().is_some() {
            self.found += (256 - self.found) / 8;
        }
    }
}

#[cfg(test)]
mod tests;
