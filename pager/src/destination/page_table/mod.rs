//! The state of every page of a destination VM. No other file changes a state.
//!
//! ```text
//!          claim_for_request        claim_for_install        mark_installed
//!  ABSENT ──────────────────▶ REQUESTED ─────────▶ INSTALLING ─────────▶ PRESENT (demand, push, zero)
//!   │ ▲ └────────────────────────────────────────▶  │                      │
//!   │ └── release_request ────────┘  release_install ┘ (→ ABSENT)           │
//!   │                                                                      ▼
//!   ├───────────── mark_discarded, from every state but POISONED ──────▶ DISCARDED
//!   └───────────── mark_poisoned, from every state ───▶ POISONED ─ mark_told ─▶ POISONED_TOLD
//!                                                          └── mark_replaced ──────┴──▶ DISCARDED (at a reset of the guest)
//! ```
//!
//! The table has half a byte a page, and one thread at a time. A state is written before the ioctl that makes it true. After
//! a crash REQUESTED means "request again", POISONED "POISON again", and INSTALLING "request again, install again": COPY on a
//! present page is `EEXIST` and harms nothing. A page of a file is PRESENT before it is mapped, because a second receive would
//! overwrite the guest's writes. COPY and CONTINUE of arriving pages are issued for INSTALLING pages only. A touch of a page
//! that is DISCARDED, or PRESENT as zeros, is answered with zeros.

pub mod file;

use std::path::Path;
use std::sync::atomic::Ordering;

use crate::destination::page_table::file::{PageFile, PageFileError, Word};
use crate::layout::MemoryLayout;
use crate::layout::address_map::PageIndex;
use crate::layout::page_run::Arrival;

/// The state of a page. The numbers are those of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PageState {
    /// Not there; nobody asked for it.
    Absent = 0,
    /// Not there; asked for on the demand lane.
    Requested = 1,
    /// Its contents are here; the ioctl may or may not have been done.
    Installing = 2,
    /// There; came because a vCPU touched it.
    PresentDemand = 3,
    /// There; came by the background push.
    PresentPush = 4,
    /// There; came as zeros or a hole.
    PresentZero = 5,
    /// Given back by the guest: reads as zeros, with any contents at the source.
    Discarded = 6,
    /// Poison; the guest has not been told.
    Poisoned = 7,
    /// Poison; the guest has been told, here or on an earlier host.
    PoisonedTold = 8,
}

/// Pages in one 64-bit word of states.
const PAGES_A_WORD: u64 = 16;

const STATES: [PageState; 9] = [
    PageState::Absent,
    PageState::Requested,
    PageState::Installing,
    PageState::PresentDemand,
    PageState::PresentPush,
    PageState::PresentZero,
    PageState::Discarded,
    PageState::Poisoned,
    PageState::PoisonedTold,
];

impl PageState {
    fn from_half(byte: u8) -> Option<Self> {
        STATES.get(usize::from(byte)).copied()
    }

    /// ABSENT, REQUESTED or INSTALLING: the source is still needed for it.
    pub fn is_missing(self) -> bool {
        matches!(self, Self::Absent | Self::Requested | Self::Installing)
    }

    /// ABSENT or REQUESTED: may be written once claimed.
    pub fn is_claimable(self) -> bool {
        matches!(self, Self::Absent | Self::Requested)
    }

    /// PRESENT, however it came.
    pub fn is_present(self) -> bool {
        matches!(self, Self::PresentDemand | Self::PresentPush | Self::PresentZero)
    }

    /// POISONED, told or not.
    pub fn is_poisoned(self) -> bool {
        matches!(self, Self::Poisoned | Self::PoisonedTold)
    }
}

/// The outcome of a poison report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoisonOutcome {
    /// The page is poison from now on; `tell` if the guest does not know of it; `was` is its state before.
    New {
        /// The guest must be told.
        tell: bool,
        /// State before.
        was: PageState,
    },
    /// It was poison already; `tell` if the guest still does not know.
    Already {
        /// The guest must be told.
        tell: bool,
    },
    /// A good copy is here and the guest has seen no error: the page stays as it is.
    Healed,
    /// No such page.
    Outside,
}

/// The outcome of a REMOVE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiscardOutcome {
    /// Reads as zeros from now on.
    Discarded,
    /// Poison stays poison.
    StaysPoisoned,
    /// No such page.
    Outside,
}

/// How many pages are in each state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts([u64; STATES.len()]);

impl Counts {
    /// Pages in a state.
    pub fn of(&self, state: PageState) -> u64 {
        self.0[state as usize]
    }

    /// Pages that still need the source.
    pub fn missing(&self) -> u64 {
        self.of(PageState::Absent) + self.of(PageState::Requested) + self.of(PageState::Installing)
    }

    /// Pages that are poison.
    pub fn poisoned(&self) -> u64 {
        self.of(PageState::Poisoned) + self.of(PageState::PoisonedTold)
    }
}

/// The table.
#[derive(Debug)]
pub struct PageTable {
    file: PageFile,
    total: u64,
    counts: Counts,
}

impl PageTable {
    /// Opens the table, or makes one with every page ABSENT. Pages that were REQUESTED or INSTALLING when an earlier
    /// pager died are ABSENT again. The flag tells whether there was a table.
    ///
    /// # Errors
    /// [`PageFileError`]: I/O, another layout, or a byte that is no state.
    pub fn open(path: &Path, layout: &MemoryLayout) -> Result<(Self, bool), PageFileError> {
        let (file, existed) = PageFile::open(path, layout)?;
        let total = layout.total_pages();
        let mut table = Self { file, total, counts: Counts::default() };
        if !existed {
            // A new file is zeros: nothing is read, so that it takes no memory.
            table.counts.0[PageState::Absent as usize] = total;
            return Ok((table, existed));
        }
        for page in (0..total).map(PageIndex) {
            let state = table.state(page).ok_or_else(|| PageFileError::Foreign {
                path: path.to_path_buf(),
                reason: "holds something that is no page state",
            })?;
            let after = if state.is_missing() { PageState::Absent } else { state };
            table.counts.0[after as usize] += 1;
            if after != state {
                table.write(page, after);
            }
        }
        Ok((table, existed))
    }

    /// State of a page; `None` beyond the last.
    pub fn state(&self, page: PageIndex) -> Option<PageState> {
        let cell = self.file.states().get(usize::try_from(page.0 / 2).ok()?).filter(|_| page.0 < self.total)?;
        PageState::from_half(cell.load(Ordering::Acquire) >> shift(page) & 0xf)
    }

    /// The only store: one byte; the half of another page stays.
    fn write(&mut self, page: PageIndex, state: PageState) {
        if let Some(cell) = usize::try_from(page.0 / 2).ok().and_then(|index| self.file.states().get(index)) {
            let others = cell.load(Ordering::Acquire) & !(0xf << shift(page));
            cell.store(others | (state as u8) << shift(page), Ordering::Release);
        }
    }

    /// How many pages are in each state; they add up to [`PageTable::total`].
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Number of pages.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// A number kept with the table.
    pub fn word(&self, word: Word) -> u64 {
        self.file.word(word).load(Ordering::Relaxed)
    }

    /// Adds to a number kept with the table.
    pub fn add(&self, word: Word, amount: u64) {
        self.file.word(word).fetch_add(amount, Ordering::Relaxed);
    }

    /// Whether no page has come yet.
    pub fn is_fresh(&self) -> bool {
        self.counts.of(PageState::Absent) + self.counts.poisoned() == self.total()
    }

    /// Binds the table to the VMM process that owns the memory. False: it describes another process, and pages of this
    /// one would be taken as arrived.
    pub fn bind(&self, pid: u32, started: u64) -> bool {
        let (bound, at) = (self.word(Word::VmmPid), self.word(Word::VmmStart));
        if (bound, at) != (u64::from(pid), started) && bound != 0 && !self.is_fresh() {
            return false;
        }
        self.file.word(Word::VmmPid).store(u64::from(pid), Ordering::Release);
        self.file.word(Word::VmmStart).store(started, Ordering::Release);
        true
    }

    /// The VMM process that owns the memory; 0: none yet.
    pub fn bound_to(&self) -> u32 {
        u32::try_from(self.word(Word::VmmPid)).unwrap_or(0)
    }

    /// Removes the file.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn remove(&self) -> std::io::Result<()> {
        self.file.remove()
    }

    fn step(&mut self, page: PageIndex, from: PageState, to: PageState) -> bool {
        if self.state(page) != Some(from) {
            return false;
        }
        self.write(page, to);
        self.counts.0[from as usize] -= 1;
        self.counts.0[to as usize] += 1;
        true
    }

    /// ABSENT → REQUESTED. False: it is not absent, or was asked for already.
    pub fn claim_for_request(&mut self, page: PageIndex) -> bool {
        self.step(page, PageState::Absent, PageState::Requested)
    }

    /// REQUESTED → ABSENT: the link was lost.
    pub fn release_request(&mut self, page: PageIndex) -> bool {
        self.step(page, PageState::Requested, PageState::Absent)
    }

    /// Claims the page for COPY or ZEROPAGE. False: it is present, discarded or poison, and must not be written.
    pub fn claim_for_install(&mut self, page: PageIndex) -> bool {
        self.step(page, PageState::Absent, PageState::Installing)
            || self.step(page, PageState::Requested, PageState::Installing)
    }

    /// INSTALLING → PRESENT: the ioctl won, or found the page there.
    pub fn mark_installed(&mut self, page: PageIndex, arrival: Arrival) -> bool {
        let to = match arrival {
            Arrival::Demand => PageState::PresentDemand,
            Arrival::Push => PageState::PresentPush,
            Arrival::Zero => PageState::PresentZero,
        };
        self.step(page, PageState::Installing, to)
    }

    /// INSTALLING → ABSENT: the ioctl could not be done.
    pub fn release_install(&mut self, page: PageIndex) -> bool {
        self.step(page, PageState::Installing, PageState::Absent)
    }

    /// The page is bad. `guest_knows`: the guest was given a machine check for it.
    pub fn mark_poisoned(&mut self, page: PageIndex, guest_knows: bool) -> PoisonOutcome {
        let Some(was) = self.state(page) else { return PoisonOutcome::Outside };
        match was {
            PageState::PoisonedTold => PoisonOutcome::Already { tell: false },
            PageState::Poisoned => {
                if guest_knows {
                    self.mark_told(page);
                }
                PoisonOutcome::Already { tell: !guest_knows }
            }
            _ if !guest_knows && !was.is_missing() => PoisonOutcome::Healed,
            _ => {
                let to = if guest_knows { PageState::PoisonedTold } else { PageState::Poisoned };
                self.step(page, was, to);
                PoisonOutcome::New { tell: !guest_knows, was }
            }
        }
    }

    /// The contents of a page that came are nowhere any more. `None`: it has not come, or is poison already.
    pub fn mark_lost(&mut self, page: PageIndex) -> Option<PoisonOutcome> {
        let was = self.state(page).filter(|was| !was.is_missing() && !was.is_poisoned())?;
        self.step(page, was, PageState::Poisoned);
        Some(PoisonOutcome::New { tell: true, was })
    }

    /// POISONED → POISONED_TOLD: the report is about to be sent, or the guest was told elsewhere.
    pub fn mark_told(&mut self, page: PageIndex) -> bool {
        self.step(page, PageState::Poisoned, PageState::PoisonedTold)
    }

    /// The VMM put fresh memory in the place of a bad page when its guest was reset: the only way out of poison.
    pub fn mark_replaced(&mut self, page: PageIndex) -> bool {
        self.step(page, PageState::Poisoned, PageState::Discarded)
            || self.step(page, PageState::PoisonedTold, PageState::Discarded)
    }

    /// The guest gave the page back.
    pub fn mark_discarded(&mut self, page: PageIndex) -> DiscardOutcome {
        match self.state(page) {
            None => DiscardOutcome::Outside,
            Some(state) if state.is_poisoned() => DiscardOutcome::StaysPoisoned,
            Some(state) => {
                self.step(page, state, PageState::Discarded);
                DiscardOutcome::Discarded
            }
        }
    }

    /// Maximal half-open runs in `[from, to)` of pages with a `wanted` state.
    pub fn runs(
        &self,
        from: PageIndex,
        to: PageIndex,
        wanted: impl Fn(PageState) -> bool,
    ) -> Vec<(PageIndex, PageIndex)> {
        let mut runs: Vec<(PageIndex, PageIndex)> = Vec::new();
        let mut at = from;
        while at < to {
            let Some(state) = self.state(at) else { break };
            let end = PageIndex((at.0 + self.alike(at, state)).min(to.0));
            match runs.last_mut() {
                _ if !wanted(state) => {}
                Some(last) if last.1 == at => last.1 = end,
                _ => runs.push((at, end)),
            }
            at = end;
        }
        runs
    }

    /// How many pages from this one on are known at a glance to have its state: 1, or 16 and multiples.
    fn alike(&self, page: PageIndex, state: PageState) -> u64 {
        if !page.0.is_multiple_of(PAGES_A_WORD) {
            return 1;
        }
        let alike = u64::from(state as u8) * 0x1111_1111_1111_1111;
        let words = usize::try_from(page.0 / PAGES_A_WORD).ok().and_then(|first| self.file.words().get(first..));
        let same = words.map_or(0, |words| words.iter().take_while(|w| w.load(Ordering::Acquire) == alike).count());
        (same as u64 * PAGES_A_WORD).max(1)
    }
}

/// Where a page's half of its byte begins.
fn shift(page: PageIndex) -> u64 {
    page.0 % 2 * 4
}

#[cfg(test)]
mod tests;
