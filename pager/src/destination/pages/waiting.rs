//! Pages that threads of the VMM wait for: never more than the VMM has threads.

use std::collections::HashMap;
use std::time::Instant;

use crate::destination::pages::first_touch::FirstTouch;
use crate::layout::address_map::PageIndex;
use crate::proto::PageProgress;

/// The wait for one page.
#[derive(Debug, Clone, Copy)]
pub struct Waiting {
    /// When its first fault was read.
    pub since: Instant,
    /// The thread that came first.
    pub thread: u32,
    /// When it was requested on the lane that is up; `None` while there is none.
    pub asked: Option<Instant>,
}

/// All waits, and how long those that are over took.
#[derive(Debug, Default)]
pub struct WaitingPages {
    waits: HashMap<PageIndex, Waiting>,
    first_touch: FirstTouch,
}

impl WaitingPages {
    /// A thread begins to wait. False: another one waits for the page already.
    pub fn begin(&mut self, page: PageIndex, thread: u32) -> bool {
        if self.waits.contains_key(&page) {
            return false;
        }
        self.waits.insert(page, Waiting { since: Instant::now(), thread, asked: None });
        true
    }

    /// The wait for a page.
    pub fn get(&self, page: PageIndex) -> Option<&Waiting> {
        self.waits.get(&page)
    }

    /// All waits.
    pub fn iter(&self) -> impl Iterator<Item = (PageIndex, Waiting)> + '_ {
        self.waits.iter().map(|(page, waiting)| (*page, *waiting))
    }

    /// The pages of a half-open range that a thread waits for.
    pub fn in_range(&self, from: PageIndex, to: PageIndex) -> Vec<PageIndex> {
        self.waits.keys().filter(|page| (from..to).contains(*page)).copied().collect()
    }

    /// The page was requested now.
    pub fn note_requested(&mut self, page: PageIndex) {
        if let Some(waiting) = self.waits.get_mut(&page) {
            waiting.asked = Some(Instant::now());
        }
    }

    /// The lane is lost, and its requests with it.
    pub fn forget_requests(&mut self) {
        self.waits.values_mut().for_each(|waiting| waiting.asked = None);
    }

    /// The pages of a half-open range are there: their waits are over, and count as first touches.
    pub fn finish(&mut self, from: PageIndex, to: PageIndex) {
        for page in self.in_range(from, to) {
            if let Some(waiting) = self.waits.remove(&page) {
                self.first_touch.record(waiting.since.elapsed());
            }
        }
    }

    /// The thread that waits for a page is woken for another try, which does not count. False: nobody waits.
    pub fn give_up(&mut self, page: PageIndex) -> bool {
        self.waits.remove(&page).is_some()
    }

    /// What the control service shows of the waits: those of now, and the latency of those that are over.
    pub fn progress(&self) -> PageProgress {
        let oldest = self.waits.values().map(|waiting| waiting.since).min();
        PageProgress {
            waiting_faults: self.waits.len() as u64,
            oldest_wait_us: oldest.map_or(0, |since| u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)),
            first_touch: Some(self.first_touch.summary()),
            ..PageProgress::default()
        }
    }
}
