//! The source's side of `Pages`. It answers a destination's requests from the memory of a frozen VM.
//!
//! ```text
//!  control ──▶ SourceServer ◀── urgent lane's thread     one thread and one connection a lane, so that
//!              (shared state) ◀── bulk lane's thread …     the push never stands before a demand
//! ```
//!
//! The source answers POISON for a page in the ledger and for a page that cannot be read (`EIO`, `EFAULT`, marker). Once
//! POISON, always POISON. The source reads only while the VM is frozen: pages of a running VM would be torn.

mod lane_tokens;
pub mod lanes;
pub mod memory;
mod poison_map;
pub mod push_order;
pub mod rate_limit;
mod sent_pages;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::lane::frame::LaneToken;
use crate::layout::PAGE_SIZE;
use crate::layout::page_run::{PageRun, PoisonInfo};
use crate::layout::{Gpa, MemoryLayout, PageId};
use crate::proto::{self, ErrorOrigin};
use crate::sched::priority;
use crate::source::memory::{GuestMemory, ReadError};
use crate::tuning::Tuning;
use crate::vmm::attached_memory::AttachedMemory;

use lane_tokens::{Agreed, LaneTokens, same};
use poison_map::PoisonMap;
use push_order::PushOrder;
use rate_limit::TokenBucket;
use sent_pages::SentPages;

/// How long a request waits for the freeze. The destination may load device state, which touches memory, during it.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(5);
/// Most ranges in the result of [`SourceServer::held`].
const MAX_HELD_RANGES: usize = 1 << 16;

/// The reason that the source cannot carry out a call.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The VMM has attached no memory yet.
    #[error("the VMM has not attached its memory")]
    NotAttached,
    /// Other memory would replace the memory that is served.
    #[error(
        "the source is frozen: it serves the memory that was attached before, and takes no other until it is thawed"
    )]
    Frozen,
    /// The vCPUs may run.
    #[error("the source is not frozen: its vCPUs may run")]
    NotFrozen,
    /// A range that is not in the layout.
    #[error("range: region {}, pages {} + {} of 4 KiB are not in the layout of {regions} regions", .asked.region, .asked.page, .asked.count)]
    Outside {
        /// The requested pages.
        asked: PageRun,
        /// Number of regions.
        regions: usize,
    },
    /// The attached memory cannot be read.
    #[error("cannot read guest memory: {0}")]
    Memory(#[from] ReadError),
}

/// The outcome of reported errors.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MarkOutcome {
    /// Newly known pages.
    pub marked: u64,
    /// Known before.
    pub already: u64,
    /// Newly known pages with a good copy sent before, so the destination may have it.
    pub healed: u64,
}

/// A VM's memory, served to its destination. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub struct SourceServer(Arc<SourceState>);

#[derive(Debug)]
struct SourceState {
    layout: MemoryLayout,
    /// The same in pages of 4 KiB, as on lanes.
    pages: MemoryLayout,
    tuning: Tuning,
    token: String,
    lane_tokens: Mutex<LaneTokens>,
    memory: Mutex<Option<Arc<GuestMemory>>>,
    frozen: Mutex<bool>,
    /// Notified at the freeze.
    froze: Condvar,
    poison: Mutex<PoisonMap>,
    sent: SentPages,
    latest_demand: Mutex<Option<PageId>>,
    pace: Mutex<TokenBucket>,
    pages_served: AtomicU64,
    bytes_served: AtomicU64,
}

impl SourceServer {
    /// Serves nothing until memory is attached and the VM frozen. `push_bytes_per_s` 0: no limit.
    pub fn new(layout: MemoryLayout, token: String, push_bytes_per_s: u64, tuning: Tuning) -> Self {
        let pages = layout.in_pages_of(PAGE_SIZE);
        let sent = SentPages::new(&pages);
        Self(Arc::new(SourceState {
            layout,
            pages,
            tuning,
            token,
            lane_tokens: Mutex::default(),
            memory: Mutex::default(),
            frozen: Mutex::default(),
            froze: Condvar::new(),
            poison: Mutex::default(),
            sent,
            latest_demand: Mutex::default(),
            pace: Mutex::new(TokenBucket::new(push_bytes_per_s, Instant::now())),
            pages_served: AtomicU64::new(0),
            bytes_served: AtomicU64::new(0),
        }))
    }

    /// The layout that is served.
    pub fn layout(&self) -> &MemoryLayout {
        &self.0.layout
    }

    /// Whether these bytes are the token that `OpenLane` must carry.
    pub fn knows_token(&self, given: &[u8]) -> bool {
        same(given, self.0.token.as_bytes())
    }

    /// Agrees on an urgent lane; returns its token.
    ///
    /// # Errors
    /// getrandom(2).
    pub fn agree_urgent(&self) -> io::Result<LaneToken> {
        lock(&self.0.lane_tokens).agree(Agreed::Urgent)
    }

    /// Agrees on a bulk lane for the lacking pages, which must lie in the layout; returns its token.
    ///
    /// # Errors
    /// [`SourceError`]; inside, getrandom(2).
    pub fn agree_bulk(&self, lacking: impl Iterator<Item = PageRun>) -> Result<io::Result<LaneToken>, SourceError> {
        let lacking = lacking.map(|run| self.checked(run)).collect::<Result<Vec<_>, _>>()?;
        self.0.frozen_memory()?;
        Ok(lock(&self.0.lane_tokens).agree(Agreed::Bulk(PushOrder::new(&self.0.pages, lacking))))
    }

    /// Takes the VMM's memory, in place of memory that was attached before. A thread of its own maps it ahead.
    ///
    /// # Errors
    /// [`SourceError::Memory`] if it cannot be read; [`SourceError::Frozen`].
    pub fn attach(&self, memory: AttachedMemory) -> Result<(), SourceError> {
        let memory = Arc::new(GuestMemory::new(memory)?);
        let ahead = Arc::downgrade(&memory);
        {
            let frozen = lock(&self.0.frozen);
            if *frozen {
                return Err(SourceError::Frozen);
            }
            *lock(&self.0.memory) = Some(memory);
        }
        self.in_background("map-ahead", move || {
            if let Some(memory) = ahead.upgrade() {
                // Until this thread is the last holder.
                memory.map_ahead(|| Arc::strong_count(&memory) > 1);
            }
        });
        Ok(())
    }

    /// Runs a task on a thread like those of the bulk lanes. The source serves without the task, too.
    fn in_background(&self, name: &'static str, task: impl FnOnce() + Send + 'static) {
        let lane_cpus = self.0.tuning.lane_cpus.clone();
        let task = move || {
            priority::batch();
            lane_cpus.pin();
            task();
        };
        if let Err(error) = std::thread::Builder::new().name(name.into()).spawn(task) {
            tracing::warn!(%error, name, "pager.no_background_thread");
        }
    }

    /// The vCPUs are stopped: the source serves pages from now on. The VMM's poison markers are copied in the background.
    ///
    /// # Errors
    /// [`SourceError::NotAttached`].
    pub fn freeze(&self) -> Result<(), SourceError> {
        let memory = {
            let mut frozen = lock(&self.0.frozen);
            let memory = self.0.memory()?;
            // A repeated call must not forget the markers of a VMM that has ended since the first.
            if std::mem::replace(&mut *frozen, true) {
                return Ok(());
            }
            memory.stopped();
            memory
        };
        self.0.froze.notify_all();
        let server = Arc::downgrade(&self.0);
        self.in_background("copy-markers", move || {
            let go_on = || server.upgrade().is_some_and(|server| *lock(&server.frozen));
            if let Err(error) = memory.copy_markers(go_on) {
                tracing::info!(%error, "pager.markers_not_copied");
            }
        });
        Ok(())
    }

    /// The vCPUs may run again: every lane ends at its next page.
    pub fn thaw(&self) {
        *lock(&self.0.frozen) = false;
    }

    /// Whether pages are served.
    pub fn is_frozen(&self) -> bool {
        *lock(&self.0.frozen)
    }

    /// Returns when pages are served, after [`FREEZE_TIMEOUT`] at the latest.
    fn await_frozen(&self) {
        drop(self.0.froze.wait_timeout_while(lock(&self.0.frozen), FREEZE_TIMEOUT, |frozen| !*frozen));
    }

    /// The rate of the push from now on, bytes a second; 0: no limit. Demand is never held back.
    pub fn limit_push(&self, bytes_per_s: u64) {
        lock(&self.0.pace).set_rate(bytes_per_s, Instant::now());
    }

    /// The rate of the push, bytes a second; 0: no limit.
    pub fn push_limit(&self) -> u64 {
        lock(&self.0.pace).rate()
    }

    /// Counts bytes as sent, and returns how long a bulk lane waits before it sends them.
    fn pace(&self, bytes: u64) -> Duration {
        lock(&self.0.pace).take(bytes, Instant::now())
    }

    /// Takes back bytes that were counted and not sent.
    fn give_back(&self, bytes: u64) {
        lock(&self.0.pace).give_back(bytes);
    }

    /// Runs of pages of 4 KiB that hold memory, at most 65536: runs are joined over short gaps if there are more. A hint while
    /// the VM runs.
    ///
    /// # Errors
    /// [`SourceError::NotAttached`], [`SourceError::Memory`].
    pub fn held(&self) -> Result<Vec<proto::PageRange>, SourceError> {
        let memory = self.0.memory()?;
        let mut held = Vec::new();
        for number in 0..self.0.pages.regions().len() as u32 {
            held.extend(memory.held(number)?.into_iter().map(|(from, to)| (number, from, to)));
        }
        let held = without_short_gaps(held, MAX_HELD_RANGES);
        let range = |(region, from, to): (u32, u64, u64)| proto::PageRange { region, page: from, count: to - from };
        Ok(held.into_iter().map(range).collect())
    }

    /// Records bad pages: the source answers POISON for them from now on. Errors outside the layout do not count.
    pub fn mark_poisoned(&self, errors: &[proto::MemoryError]) -> MarkOutcome {
        let mut outcome = MarkOutcome::default();
        for error in errors {
            let note = PoisonInfo { origin: error.origin(), guest_visible: error.guest_visible, hop: error.hop };
            for id in self.0.pages.pages_of_block(Gpa(error.gpa), error.lsb) {
                if !lock(&self.0.poison).add(id, note) {
                    outcome.already += 1;
                    continue;
                }
                outcome.marked += 1;
                outcome.healed += u64::from(self.0.sent.contains(id));
            }
        }
        outcome
    }

    /// Pages of 4 KiB and bytes of contents served so far.
    pub fn served(&self) -> (u64, u64) {
        (self.0.pages_served.load(Ordering::Relaxed), self.0.bytes_served.load(Ordering::Relaxed))
    }

    fn checked(&self, asked: PageRun) -> Result<PageRun, SourceError> {
        match self.0.pages.contains(asked.region, asked.page, asked.count) {
            true => Ok(asked),
            false => Err(SourceError::Outside { asked, regions: self.0.pages.regions().len() }),
        }
    }

    fn latest_demand(&self) -> Option<PageId> {
        *lock(&self.0.latest_demand)
    }

    fn note_demand(&self, asked: PageRun) {
        *lock(&self.0.latest_demand) = Some(PageId { region: asked.region, page: asked.page });
    }
}

impl SourceState {
    fn memory(&self) -> Result<Arc<GuestMemory>, SourceError> {
        lock(&self.memory).clone().ok_or(SourceError::NotAttached)
    }

    fn frozen_memory(&self) -> Result<Arc<GuestMemory>, SourceError> {
        if !*lock(&self.frozen) {
            return Err(SourceError::NotFrozen);
        }
        self.memory()
    }

    /// The first page of a run that is known to be bad.
    fn known_poison(&self, run: PageRun) -> Option<(u64, PoisonInfo)> {
        lock(&self.poison).first_in(run.region, run.page..run.page + run.count)
    }

    /// Records pages that a read found poisoned.
    fn found_poison(&self, run: PageRun) -> PoisonInfo {
        let note = PoisonInfo { origin: ErrorOrigin::Read, guest_visible: false, hop: 0 };
        let mut known = lock(&self.poison);
        for page in run.page..run.page + run.count {
            known.add(PageId { region: run.region, page }, note);
        }
        note
    }
}

/// Joins runs over ever longer gaps until there are at most `most` (or one a region).
fn without_short_gaps(mut runs: Vec<(u32, u64, u64)>, most: usize) -> Vec<(u32, u64, u64)> {
    let mut gap = 1;
    while runs.len() > most && gap < u64::MAX / 2 {
        let mut joined: Vec<(u32, u64, u64)> = Vec::new();
        for (region, from, to) in runs {
            match joined.last_mut() {
                Some(last) if last.0 == region && from - last.2 <= gap => last.2 = to,
                _ => joined.push((region, from, to)),
            }
        }
        runs = joined;
        gap *= 2;
    }
    runs
}

/// These locks guard plain values that no panic can leave half-changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
