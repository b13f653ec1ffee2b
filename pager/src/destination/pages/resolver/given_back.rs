//! Pages that the VMM gives back, and poison that it replaces by fresh memory when its guest is reset.
//!
//! A VMM replaces a bad page in one of two ways. It drops the page (`MADV_DONTNEED`, a hole in the file): a REMOVE tells, and
//! the marker is gone. Or it maps other memory there: that mapping is not registered. A balloon drops pages in the first way
//! too. So poison stays poison until the daemon says that the guest was reset.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::destination::page_table::{DiscardOutcome, PageState};
use crate::destination::pages::resolver::Resolver;
use crate::layout::Hva;
use crate::layout::address_map::{NumberedRegion, PageIndex};
use crate::proto::pager_event::Event;
use crate::proto::{MemoryBlock, PagesReplacedEvent};
use crate::sys::userfaultfd::Stop;

/// So long after the REMOVE of a poisoned page a touch waits for the word that the guest was reset. A VMM of the VMM protocol
/// says it before its vCPUs run again; the daemon's word of any other VMM comes behind them.
const HOLD: Duration = Duration::from_millis(500);
/// Between two looks at the threads that wait so.
pub const HOLD_CHECK: Duration = Duration::from_millis(20);

/// Poisoned pages without their markers.
#[derive(Debug, Default)]
pub(super) struct DroppedMarkers {
    since: HashMap<PageIndex, Instant>,
    /// The thread that came first to each page that is held.
    held: HashMap<PageIndex, u32>,
}

impl DroppedMarkers {
    fn note(&mut self, page: PageIndex) {
        self.since.insert(page, Instant::now());
    }

    /// The marker is there (again).
    pub(super) fn marked(&mut self, page: PageIndex) {
        self.since.remove(&page);
    }

    fn is_recent(&self, page: PageIndex) -> bool {
        self.since.get(&page).is_some_and(|since| since.elapsed() < HOLD)
    }
}

impl Resolver {
    /// A range is given back by the guest (or unmapped): poison stays, everything else reads as zeros.
    pub fn discard(&mut self, start: Hva, end: Hva) {
        let Some(memory) = &mut self.memory else { return };
        for (from, to) in memory.address_map().pages_in(start, end) {
            // A page under installation may be in its file already.
            let missing = self.table.runs(from, to, PageState::is_missing);
            for page in (from.0..to.0).map(PageIndex) {
                let outcome = self.table.mark_discarded(page);
                memory.forget(page);
                match outcome {
                    DiscardOutcome::Discarded if self.waiting.give_up(page) => memory.wake(page),
                    DiscardOutcome::StaysPoisoned => self.dropped.note(page),
                    DiscardOutcome::Discarded | DiscardOutcome::Outside => {}
                }
            }
            for (from, to) in missing {
                if memory.is_by_file(from) {
                    memory.drop_contents(from, to);
                }
            }
        }
    }

    /// Whether a touch of poison must wait for a word of the daemon; then the page is held.
    pub(super) fn holds(&mut self, page: PageIndex, thread: u32) -> bool {
        let holds = self.reporter.kernel_tells() && self.dropped.is_recent(page);
        if holds {
            self.dropped.held.entry(page).or_insert(thread);
        }
        holds
    }

    /// Poisons the held pages whose time is over. Returns whether others are held still.
    pub fn end_holds(&mut self) -> bool {
        let late: Vec<_> = self.dropped.held.keys().copied().filter(|page| !self.dropped.is_recent(*page)).collect();
        for page in late {
            let thread = self.dropped.held.remove(&page).unwrap_or_default();
            if self.touch_poison(page, thread).is_some() {
                self.memory.iter().for_each(|memory| memory.wake(page));
            }
        }
        !self.dropped.held.is_empty()
    }

    /// The guest was reset: poison that the VMM has replaced is forgotten. Returns the number of such pages.
    pub fn forget_replaced(&mut self) -> u64 {
        let replaced: Vec<_> = self.poisoned_pages().into_iter().filter(|page| self.is_replaced(*page)).collect();
        let mut pages = Vec::new();
        for page in replaced {
            if !self.table.mark_replaced(page) {
                continue;
            }
            self.reporter.forget(page);
            self.dropped.marked(page);
            let held = self.dropped.held.remove(&page).is_some();
            if let Some(memory) = &self.memory {
                // After the end nothing but poison is registered. The kernel then wakes the threads, which read zeros.
                let unregistered = self.unregistered && memory.unregister(page, PageIndex(page.0 + 1)).is_ok();
                if held && !unregistered {
                    memory.wake(page);
                }
            }
            let block = |region: &NumberedRegion| MemoryBlock { gpa: region.gpa_of(page).0, lsb: region.lsb() };
            pages.extend(self.numbering.region_of(page).map(block));
        }
        let replaced = pages.len() as u64;
        if replaced > 0 {
            tracing::info!(replaced, "pager.poison_replaced");
            self.events().append(Event::PagesReplaced(PagesReplacedEvent { pages }));
        }
        replaced
    }

    /// A REMOVE alone proves nothing: a hole in the file leaves the marker. A marker that is missing without a REMOVE was
    /// never there, and is placed by the look at it.
    fn is_replaced(&self, page: PageIndex) -> bool {
        let Some(memory) = &self.memory else { return false };
        match self.dropped.since.contains_key(&page) {
            true => !memory.has_marker(page),
            false => memory.mark_if_registered(page) == Some(Stop::NotRegistered),
        }
    }
}
