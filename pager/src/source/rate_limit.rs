//! The rate of the push: a token bucket whose rate may change while it runs. Pure: time is given.

use std::time::{Duration, Instant};

/// Bytes that may be sent at once after a pause, as time at the rate.
const BURST: Duration = Duration::from_millis(20);

/// Hands out bytes at a rate.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    /// Bytes a second; 0: no limit.
    rate: u64,
    /// When all that was handed out has been sent at the rate: ahead of now while there is debt.
    free_at: Instant,
}

impl TokenBucket {
    /// `rate` in bytes a second; 0: no limit.
    pub fn new(rate: u64, now: Instant) -> Self {
        Self { rate, free_at: now }
    }

    /// Another rate from now on; what has been handed out is not held against it.
    pub fn set_rate(&mut self, rate: u64, now: Instant) {
        *self = Self::new(rate, now);
    }

    /// Bytes a second; 0: no limit.
    pub fn rate(&self) -> u64 {
        self.rate
    }

    /// Hands out `bytes`, and says how long to wait before they are sent. They may be more than a second's worth: then
    /// the next wait is the longer.
    pub fn take(&mut self, bytes: u64, now: Instant) -> Duration {
        if self.rate == 0 {
            return Duration::ZERO;
        }
        let start = self.free_at.max(now.checked_sub(BURST).unwrap_or(now));
        self.free_at = start + Duration::from_secs_f64(bytes as f64 / self.rate as f64);
        start.saturating_duration_since(now)
    }

    /// Takes back bytes that were handed out and not sent: holes and zeros take none.
    pub fn give_back(&mut self, bytes: u64) {
        if self.rate > 0 {
            let time = Duration::from_secs_f64(bytes as f64 / self.rate as f64);
            self.free_at = self.free_at.checked_sub(time).unwrap_or(self.free_at);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn without_a_limit_nothing_waits() {
        let now = Instant::now();
        let mut bucket = TokenBucket::new(0, now);
        assert!((0..1000).all(|_| bucket.take(u64::MAX / 2, now).is_zero()));
    }

    #[test]
    fn a_new_rate_holds_at_once() {
        let now = Instant::now();
        let mut bucket = TokenBucket::new(1, now);
        bucket.take(1 << 20, now);
        assert!(bucket.take(1, now) > Duration::from_secs(1 << 19));
        bucket.set_rate(1 << 30, now);
        assert!(bucket.take(1, now).is_zero());
        bucket.set_rate(0, now);
        assert!(bucket.take(1 << 40, now).is_zero());
    }

    #[test]
    fn what_was_not_sent_is_not_counted() {
        let now = Instant::now();
        let mut bucket = TokenBucket::new(1, now);
        for _ in 0..1000 {
            assert!(bucket.take(1 << 18, now).is_zero());
            bucket.give_back(1 << 18);
        }
        bucket.take(10, now);
        bucket.give_back(4);
        assert_eq!(bucket.take(1, now), Duration::from_secs(6));
    }

    proptest! {
        /// Whoever waits as told never sends more than the rate and a burst, and loses nothing but the burst.
        #[test]
        fn the_rate_is_kept(rate in 1u64..1 << 34, chunks in prop::collection::vec((1u64..1 << 20, 0u64..50_000), 1..200)) {
            let start = Instant::now();
            let mut now = start;
            let mut bucket = TokenBucket::new(rate, start);
            let (mut sent, mut last) = (0, 0);
            for (bytes, pause_us) in chunks {
                now += Duration::from_micros(pause_us);
                let wait = bucket.take(bytes, now);
                now += wait;
                let elapsed = (now - start) + BURST + Duration::from_micros(1);
                prop_assert!(sent as f64 <= rate as f64 * elapsed.as_secs_f64(), "before the chunk is sent");
                if !wait.is_zero() {
                    prop_assert!(wait.as_secs_f64() <= last as f64 / rate as f64 + 1e-6, "no longer than the chunk before takes");
                }
                sent += bytes;
                last = bytes;
            }
        }
    }
}
