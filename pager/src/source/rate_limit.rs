//! The rate limit of the push: a token bucket. Its rate may change at any time. Pure: the caller gives the time.

use std::time::{Duration, Instant};

/// Bytes that may be sent at once after a pause, as time at the rate.
const BURST: Duration = Duration::from_millis(20);

/// Hands out bytes at a rate.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    /// Bytes a second; 0: no limit.
    rate: u64,
    /// The time at which all bytes handed out are sent at this rate. It lies ahead of now while there is debt.
    free_at: Instant,
}

impl TokenBucket {
    /// `rate` in bytes a second; 0: no limit.
    pub fn new(rate: u64, now: Instant) -> Self {
        Self { rate, free_at: now }
    }

    /// Changes the rate. Bytes handed out before do not count against it.
    pub fn set_rate(&mut self, rate: u64, now: Instant) {
        *self = Self::new(rate, now);
    }

    /// Bytes a second; 0: no limit.
    pub fn rate(&self) -> u64 {
        self.rate
    }

    /// Hands out `bytes`, and returns the wait before they are sent. They may be worth more than a second; the next wait is
    /// longer then.
    pub fn take(&mut self, bytes: u64, now: Instant) -> Duration {
        if self.rate == 0 {
            return Duration::ZERO;
        }
        let start = self.free_at.max(now.checked_sub(BURST).unwrap_or(now));
        self.free_at = start + Duration::from_secs_f64(bytes as f64 / self.rate as f64);
        start.saturating_duration_since(now)
    }

    /// Takes back bytes that were handed out and not sent, because pages were holes or zeros.
    pub fn give_back(&mut self, bytes: u64) {
        if self.rate > 0 {
            let time = Duration::from_secs_f64(bytes as f64 / self.rate as f64);
            self.free_at = self.free_at.checked_sub(time).unwrap_or(self.free_at);
        }
    }
}

#[cfg(test)]
mod tests;
