//! Decides whether a push is heavy. Pure.
//!
//! A heavy push leaves no core idle: a thread that wakes waits for one, unless it is real-time. During a light push (a
//! limit, or a slow network) cores sleep, and a wake-up takes longer than the rest of a fault: spinning is then better.
//! The thresholds are those of docs/decisions/0013-heavy-and-light-push.md.

use std::time::{Duration, Instant};

/// The window of a judgement.
const WINDOW: Duration = Duration::from_millis(50);
/// Below this load, in percent of a core, a push becomes light.
const LIGHT: u128 = 45;
/// At this load a push becomes heavy. It is above the other, because lanes take longer once real-time threads preempt them.
const HEAVY: u128 = 60;

/// The load of a push in progress.
#[derive(Debug)]
pub struct PushLoad {
    since: Instant,
    /// The work of all lanes at the start of the window.
    worked: Duration,
    heavy: bool,
}

impl PushLoad {
    /// A push that begins, after so much work of its lanes. It counts as heavy until the first judgement.
    pub fn new(now: Instant, worked: Duration) -> Self {
        Self { since: now, worked, heavy: true }
    }

    /// Whether it is heavy; `worked` is the work of all lanes until now.
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
