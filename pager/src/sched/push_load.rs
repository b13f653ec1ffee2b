//! Whether a push is heavy: pure.
//!
//! A heavy push leaves no core idle: whoever wakes has to wait for one unless it goes before all others. Beside a light one,
//! of which a limit or the network lets less through, cores sleep, and to wake one takes longer than all else about a fault:
//! then it is better to spin.

use std::time::{Duration, Instant};

/// How long it is watched before it is judged.
const WINDOW: Duration = Duration::from_millis(50);
/// It becomes light where its lanes work for less than this part of the time, in percent of a core.
const LIGHT: u128 = 45;
/// It becomes heavy where they work for so much: they take longer for the same beside others that go before them.
const HEAVY: u128 = 60;

/// The weight of a push that goes on.
#[derive(Debug)]
pub struct PushLoad {
    since: Instant,
    /// How long lanes had worked by then.
    worked: Duration,
    heavy: bool,
}

impl PushLoad {
    /// Of a push that begins, by whose lanes so much work has been done before: heavy until it is known.
    pub fn new(now: Instant, worked: Duration) -> Self {
        Self { since: now, worked, heavy: true }
    }

    /// Whether it is heavy; `worked`: how long lanes have worked until now, all together.
    pub fn is_heavy(&mut self, now: Instant, worked: Duration) -> bool {
        let time = now.saturating_duration_since(self.since);
        if time >= WINDOW {
            let percent = worked.saturating_sub(self.worked).as_nanos() * 100 / time.as_nanos();
            self.heavy = percent >= if self.heavy { LIGHT } else { HEAVY };
            (self.since, self.worked) = (now, worked);
        }
        self.heavy
    }
}

#[cfg(test)]
mod tests;
