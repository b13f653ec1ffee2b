//! The pager's numbered events: 1, 2, 3, … without gaps, kept until the daemon acknowledges them.
//!
//! The page path appends, and any number of watchers read. A `watch` channel carries the newest number only, and watchers
//! read the events from the log. So a slow watcher loses nothing and delays no other thread.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

use crate::proto::{PagerEvent, pager_event::Event};

/// Most events handed to a watcher at once.
const BATCH: usize = 256;

/// The log; clones share it.
#[derive(Debug, Clone)]
pub struct EventLog {
    kept: Arc<Mutex<Kept>>,
    newest: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Kept {
    /// Consecutive numbers; the last is `newest`.
    events: VecDeque<PagerEvent>,
    newest: u64,
}

impl Default for EventLog {
    fn default() -> Self {
        Self { kept: Arc::default(), newest: watch::Sender::new(0) }
    }
}

impl EventLog {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends an event, wakes the watchers, and returns its number.
    pub fn append(&self, event: Event) -> u64 {
        let number = self.append_quietly(event);
        self.wake_watchers();
        number
    }

    /// Appends an event and returns its number. [`EventLog::wake_watchers`] wakes the watchers later, because that takes longer
    /// than a vCPU should wait.
    pub fn append_quietly(&self, event: Event) -> u64 {
        let mut kept = self.kept();
        kept.newest += 1;
        let number = kept.newest;
        kept.events.push_back(PagerEvent { number, at_us: now_us(), event: Some(event) });
        number
    }

    /// Wakes the watchers if an event was appended quietly.
    pub fn wake_watchers(&self) {
        let newest = self.newest();
        self.newest.send_if_modified(|told| std::mem::replace(told, newest) != newest);
    }

    /// Number of the newest event; 0 before the first.
    pub fn newest(&self) -> u64 {
        self.kept().newest
    }

    /// Forgets events up to and with this number.
    pub fn acknowledge(&self, up_to: u64) {
        let mut kept = self.kept();
        while kept.events.front().is_some_and(|event| event.number <= up_to) {
            kept.events.pop_front();
        }
    }

    /// Kept events after a number, oldest first, at most 256.
    pub fn after(&self, number: u64) -> Vec<PagerEvent> {
        let kept = self.kept();
        let first = kept.events.partition_point(|event| event.number <= number);
        kept.events.range(first..).take(BATCH).cloned().collect()
    }

    /// Changes whenever an event is appended.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }
}

/// Unix time in microseconds.
pub fn now_us() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
