//! What a fault, an arrived run, a REMOVE and a known error do: synchronous, no network. It is
//! behind a lock ([`crate::destination::pages::shared_pages::SharedPages`]).
//!
//! A page that is resolved as poison is reported first (frame to the VMM), then marked, which wakes the vCPU; then whoever
//! else is to know of it is woken. `POISONED_TOLD` is written before the frame is sent, so no page is reported twice.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use crate::destination::memory::claim::Claim;
use crate::destination::memory::installer::Installer;
use crate::destination::memory::receive_mapping::ReceiveMapping;
use crate::destination::page_table::file::Word;
use crate::destination::page_table::{DiscardOutcome, PageState, PageTable, PoisonOutcome};
use crate::destination::pages::first_touch::FirstTouch;
use crate::event_log::{EventLog, now_us};
use crate::lane::frame::Ask;
use crate::layout::PAGE_SIZE;
use crate::layout::address_map::{NumberedRegion, PageIndex, PageNumbering};
use crate::layout::page_run::{LaneKind, PageRun, PoisonInfo};
use crate::layout::{Gpa, Hva};
use crate::proto::{MarkPoisonedReply, MemoryError, MemoryErrorEvent, PageProgress, Severity, pager_event};
use crate::sched::priority;
use crate::sys::userfaultfd::Stop;
use crate::vmm::notifier::VmmNotifier;

/// A page on which a vCPU waits.
#[derive(Debug, Clone, Copy)]
pub struct Waiting {
    /// When its first fault was read.
    pub since: Instant,
    /// The thread that came first.
    pub thread: u32,
    /// When it was asked for on the lane that is up; `None` while there is none.
    pub asked: Option<Instant>,
}

/// What a fault needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultOutcome {
    /// The page must be asked for.
    Ask(PageIndex),
    /// It was asked for already.
    Waits,
    /// Woken: data, zeros or a marker are there.
    Resolved,
    /// Woken for another try: the ioctl could not be done now.
    Again(Stop),
    /// No page of the layout.
    Outside,
}

/// The pages of a destination VM.
#[derive(Debug)]
pub struct Resolver {
    numbering: PageNumbering,
    table: PageTable,
    memory: Option<Installer>,
    notifier: Option<VmmNotifier>,
    events: EventLog,
    waiting: HashMap<PageIndex, Waiting>,
    /// First page of each claim that is not settled, and one past its last.
    open: Vec<(PageIndex, PageIndex)>,
    notes: HashMap<PageIndex, PoisonInfo>,
    first_touch: FirstTouch,
    unregistered: bool,
}

impl Resolver {
    /// No memory is attached yet.
    pub fn new(numbering: PageNumbering, table: PageTable, events: EventLog) -> Self {
        Self {
            numbering,
            table,
            memory: None,
            notifier: None,
            events,
            waiting: HashMap::new(),
            open: Vec::new(),
            notes: HashMap::new(),
            first_touch: FirstTouch::default(),
            unregistered: false,
        }
    }

    /// The numbering of the pages.
    pub fn numbering(&self) -> &PageNumbering {
        &self.numbering
    }

    /// The table, to look at.
    pub fn table(&self) -> &PageTable {
        &self.table
    }

    /// What the daemon is told of, in the order in which it came.
    pub fn events(&self) -> &EventLog {
        &self.events
    }

    /// The memory, if one is attached.
    pub fn memory(&self) -> Option<&Installer> {
        self.memory.as_ref()
    }

    /// Takes the VMM's memory: its poison gets its markers, threads that wait try again.
    ///
    /// # Errors
    /// What is wrong with it, for people; the VMM is not told `attached` then.
    pub fn attach(
        &mut self,
        pid: u32,
        started: u64,
        memory: Installer,
        notifier: Option<VmmNotifier>,
    ) -> Result<(), String> {
        if !self.table.bind(pid, started) {
            return Err(format!("the page table belongs to another VMM than process {pid}"));
        }
        if let Some(notifier) = &notifier {
            notifier.attached().map_err(|e| format!("the VMM cannot be answered: {e}"))?;
        }
        self.memory = Some(memory);
        self.notifier = notifier;
        for page in self.poisoned_pages() {
            let reported = self.report(page, None);
            self.mark(page, true);
            self.note(reported);
        }
        if let Some(memory) = &self.memory {
            memory.wake_all();
        }
        Ok(())
    }

    /// Whether pages can be received in place.
    pub fn can_receive_directly(&self, pages: PageRun) -> bool {
        self.memory.as_ref().is_some_and(|memory| memory.can_receive_directly(pages))
    }

    /// Claims those of a frame's pages that are wanted. `None`: see [`Installer::claim`].
    pub fn claim(&mut self, pages: PageRun, lane: LaneKind) -> Option<Claim> {
        let claim = self.memory.as_ref()?.claim(&mut self.table, pages, lane)?;
        self.open.push(claim.range());
        Some(claim)
    }

    /// The same, to be received in place: see [`Installer::claim_in_place`].
    pub fn claim_in_place(&mut self, pages: PageRun, lane: LaneKind) -> Option<(Claim, *mut u8)> {
        let (claim, at) = self.memory.as_ref()?.claim_in_place(&mut self.table, pages, lane)?;
        self.open.push(claim.range());
        Some((claim, at))
    }

    /// What has come of a claim is present.
    pub fn mark_arrived(&mut self, claim: &Claim) {
        for (from, to) in claim.arrived() {
            let marked = (from.0..to.0).filter(|page| self.table.mark_installed(PageIndex(*page), claim.arrival()));
            let bytes = marked.count() as u64 * PAGE_SIZE;
            self.table.add(Word::BytesReceived, bytes);
        }
    }

    /// Nothing more comes of a claim: the rest is absent again.
    pub fn finish_claim(&mut self, claim: &Claim) {
        self.mark_arrived(claim);
        for (from, to) in claim.arrived() {
            for page in self.waiting_in(from, to) {
                // It may have been copied and gone again (reclaimed), to be faulted on anew: then nobody was woken.
                if self.waiting.get(&page).is_some_and(|waiting| waiting.since >= claim.began()) {
                    self.memory.iter().for_each(|memory| memory.wake(page));
                }
            }
            self.touched(from, to);
        }
        for page in claim.missing() {
            self.table.release_install(page);
        }
        if let Some(at) = self.open.iter().position(|range| *range == claim.range()) {
            self.open.swap_remove(at);
        }
    }

    /// Whether one of these pages is in a claim that is not settled.
    pub fn is_claimed(&self, pages: PageRun) -> bool {
        let Some(region) = self.numbering.regions().get(pages.region as usize) else { return false };
        let (first, last) = (region.page_of_piece(pages.page).0, region.page_of_piece(pages.page + pages.count - 1).0);
        self.open.iter().any(|(from, end)| *from <= last && first < *end)
    }

    /// Pages are received in place from now on, where there is a landing; in the order of the layout.
    pub fn set_receive_mappings(&mut self, receive_mappings: Vec<Option<ReceiveMapping>>) {
        if let Some(memory) = &mut self.memory {
            memory.set_receive_mappings(receive_mappings);
        }
    }

    /// Nothing is received in place any more.
    pub fn take_receive_mappings(&mut self) -> Vec<Arc<ReceiveMapping>> {
        self.memory.as_mut().map(Installer::take_receive_mappings).unwrap_or_default()
    }

    /// The VMM hung up: nobody can be told any more. Its memory is served as long as it is there.
    pub fn hang_up(&mut self) {
        self.notifier = None;
    }

    /// The VMM's address space is gone.
    pub fn drop_memory(&mut self) {
        self.memory = None;
    }

    fn poisoned_pages(&self) -> Vec<PageIndex> {
        let end = PageIndex(self.table.total());
        let runs = self.table.runs(PageIndex(0), end, PageState::is_poisoned);
        runs.into_iter().flat_map(|(from, to)| (from.0..to.0).map(PageIndex)).collect()
    }

    /// A thread waits at an address; `minor`: the file behind the mapping holds something there.
    pub fn fault(&mut self, at: Hva, thread: u32, minor: bool) -> FaultOutcome {
        let Some(page) = self.memory.as_ref().and_then(|m| m.address_map().page_at(at)) else {
            return FaultOutcome::Outside;
        };
        self.table.add(Word::Faults, 1);
        let state = self.table.state(page).unwrap_or(PageState::Absent);
        if state.is_missing() {
            let now = Instant::now();
            if self.waiting.contains_key(&page) {
                self.table.add(Word::DuplicateFaults, 1);
                return FaultOutcome::Waits;
            }
            self.waiting.insert(page, Waiting { since: now, thread, asked: None });
            return FaultOutcome::Ask(page);
        }
        let stop = match &mut self.memory {
            _ if state.is_poisoned() => {
                let reported = self.report(page, Some(thread));
                let stop = self.mark(page, false);
                self.note(reported);
                stop
            }
            Some(memory) => memory.refill(page, minor),
            None => None,
        };
        match stop {
            None => FaultOutcome::Resolved,
            Some(stop) => {
                self.memory.iter().for_each(|m| m.wake(page));
                FaultOutcome::Again(stop)
            }
        }
    }

    /// Claims a waiting page for a request; `None`: it is on its way already, or not missing any more. A huge page of which
    /// part has come is asked for all the same: the rest may be long in coming.
    pub fn ask(&mut self, page: PageIndex) -> Option<Ask> {
        let region = self.numbering.region_of(page)?;
        let pieces = region.pieces();
        let coming = pieces > 1 && self.table.state(page) == Some(PageState::Installing);
        if !self.table.claim_for_request(page) && !coming {
            return None;
        }
        let ask = Ask { region: region.number, page: (page.0 - region.first.0) * pieces, count: pieces as u32 };
        if let Some(waiting) = self.waiting.get_mut(&page) {
            waiting.asked = Some(Instant::now());
        }
        Some(ask)
    }

    /// Pages on which somebody waits, and which nobody was asked for.
    pub fn unasked(&self) -> Vec<PageIndex> {
        let absent = |page: &&PageIndex| self.table.state(**page) == Some(PageState::Absent);
        self.waiting.keys().filter(absent).copied().collect()
    }

    /// Pages on which somebody waits.
    pub fn waiting(&self) -> impl Iterator<Item = (PageIndex, Waiting)> + '_ {
        self.waiting.iter().map(|(page, waiting)| (*page, *waiting))
    }

    /// The link is lost: what was asked for, or has come in part, is absent again; who waits goes on waiting.
    pub fn release_requests(&mut self) {
        if let Some(memory) = &mut self.memory {
            memory.abandon(&mut self.table);
        }
        for (page, waiting) in &mut self.waiting {
            self.table.release_request(*page);
            waiting.asked = None;
        }
    }

    /// Whether a frame's pages lie in the layout.
    ///
    /// # Errors
    /// In words for people, if not: the source speaks nonsense.
    pub fn check(&self, pages: PageRun) -> Result<(), String> {
        let region = self.numbering.regions().get(pages.region as usize);
        let end = pages.page.checked_add(pages.count);
        match region.zip(end).is_some_and(|(region, end)| end <= region.region.size / PAGE_SIZE) {
            true => Ok(()),
            false => Err(format!(
                "the source sent region {} pages {}+{} of 4 KiB, outside the layout",
                pages.region, pages.page, pages.count
            )),
        }
    }

    /// Pieces of huge pages came with their bytes, of which `handled` are dealt with already; it is advanced. After a stop, to
    /// be called again.
    pub fn pieces(&mut self, pages: PageRun, lane: LaneKind, bytes: &[u8], handled: &mut u64) -> Option<Stop> {
        let Some(memory) = &mut self.memory else { return Some(Stop::ProcessGone) };
        let installed = memory.pieces(&mut self.table, pages, lane, bytes, handled);
        for (from, to) in installed.runs {
            let size = self.numbering.region_of(from).map_or(0, |r| r.region.page_size);
            self.table.add(Word::BytesReceived, (to.0 - from.0) * size);
            self.touched(from, to);
        }
        installed.stop
    }

    /// Zeros came. After a stop, to be called again.
    pub fn zeros(&mut self, pages: PageRun, lane: LaneKind) -> Option<Stop> {
        let Some(memory) = &mut self.memory else { return Some(Stop::ProcessGone) };
        let installed = memory.zeros(&mut self.table, pages, lane);
        for (from, to) in &installed.runs {
            for page in self.waiting_in(*from, *to) {
                // Where it cannot be made now, whoever waits faults anew.
                if self.table.state(page) == Some(PageState::PresentZero)
                    && let Some(memory) = &self.memory
                    && memory.refill(page, false).is_some()
                {
                    memory.wake(page);
                }
            }
        }
        for (from, to) in installed.runs {
            self.touched(from, to);
        }
        installed.stop
    }

    /// Bad pages came, for which no claim is open. After a stop, to be called again.
    pub fn poison(&mut self, pages: PageRun, note: PoisonInfo) -> Option<Stop> {
        let region = self.numbering.regions().get(pages.region as usize)?;
        let first = region.page_of_piece(pages.page).0;
        let last = region.page_of_piece(pages.page + pages.count - 1).0;
        for page in (first.0..=last.0).map(PageIndex) {
            let outcome = self.table.mark_poisoned(page, note.guest_visible);
            let stop = match outcome {
                PoisonOutcome::Healed | PoisonOutcome::Outside => None,
                PoisonOutcome::New { .. } | PoisonOutcome::Already { .. } => self.resolve_poison(page, note, outcome),
            };
            if stop.is_some() {
                return stop;
            }
        }
        None
    }

    /// Report, then marker, then the wait is over.
    fn resolve_poison(&mut self, page: PageIndex, note: PoisonInfo, outcome: PoisonOutcome) -> Option<Stop> {
        if matches!(outcome, PoisonOutcome::New { .. }) {
            self.notes.insert(page, note);
            if note.guest_visible {
                self.events.append_quietly(pager_event::Event::MemoryError(self.event(page, None, false)));
            }
        }
        let waits = self.waiting.get(&page).map(|w| w.thread);
        let reported = self.report(page, waits);
        let mut had_contents = false;
        if let (PoisonOutcome::New { was, .. }, Some(memory)) = (outcome, &mut self.memory) {
            memory.forget(page);
            had_contents = was.is_present();
        }
        let stop = self.mark(page, had_contents);
        if stop.is_none() {
            self.touched(page, PageIndex(page.0 + 1));
        }
        self.note(reported);
        stop
    }

    /// Behind the vCPU, which may wait for this core: the VMM is woken for what it was told, and the daemon is told.
    fn note(&self, reported: Option<MemoryErrorEvent>) {
        if let Some(event) = reported {
            priority::yield_cpu();
            self.notifier.iter().for_each(VmmNotifier::notify);
            self.events.append_quietly(pager_event::Event::MemoryError(event));
        }
    }

    /// Who waited on these pages goes on: they are counted as first touches.
    fn touched(&mut self, from: PageIndex, to: PageIndex) {
        for page in self.waiting_in(from, to) {
            if let Some(waiting) = self.waiting.remove(&page) {
                self.first_touch.record(waiting.since.elapsed());
            }
        }
    }

    /// Those of these pages on which somebody waits: there are never more than threads of the VMM.
    fn waiting_in(&self, from: PageIndex, to: PageIndex) -> Vec<PageIndex> {
        self.waiting.keys().filter(|page| (from..to).contains(*page)).copied().collect()
    }

    /// Reports a poisoned page to the VMM, once; what the daemon is to be told of it. `waits`: the thread that waits on it, if
    /// one does. Before a VMM is attached nothing is reported: attaching does it.
    #[must_use]
    fn report(&mut self, page: PageIndex, waits: Option<u32>) -> Option<MemoryErrorEvent> {
        if self.memory.is_none() || !self.table.mark_told(page) {
            return None;
        }
        let mut event = self.event(page, waits, true);
        event.reported = match self.notifier.as_ref().map(|t| t.memory_error(&event)) {
            Some(Ok(())) => {
                self.table.add(Word::MachineChecks, 1);
                true
            }
            Some(Err(error)) => {
                tracing::warn!(%error, page = page.0, "pager.report_lost");
                false
            }
            None => false,
        };
        if let Some(error) = &mut event.error {
            error.guest_visible = event.reported;
        }
        Some(event)
    }

    fn event(&self, page: PageIndex, waits: Option<u32>, report: bool) -> MemoryErrorEvent {
        let region = self.numbering.region_of(page);
        let note = self.notes.get(&page).copied().unwrap_or(PoisonInfo {
            origin: crate::proto::ErrorOrigin::Read,
            guest_visible: false,
            hop: 0,
        });
        let severity = match (report, waits) {
            (false, _) => Severity::Unspecified,
            (true, None) => Severity::ActionOptional,
            (true, Some(_)) => Severity::ActionRequired,
        };
        let error = MemoryError {
            gpa: region.map_or(0, |r| r.gpa_of(page).0),
            lsb: region.map_or(12, |r| r.lsb()),
            origin: note.origin.into(),
            severity: severity.into(),
            guest_visible: note.guest_visible,
            hop: note.hop,
            count: 1,
            first_seen_us: now_us(),
            last_seen_us: now_us(),
        };
        let hva = self.memory.as_ref().and_then(|m| m.address_map().address_of(page)).map_or(0, |(hva, _)| hva.0);
        MemoryErrorEvent { error: Some(error), hva, thread_id: waits.unwrap_or(0), reported: false }
    }

    fn mark(&self, page: PageIndex, had_contents: bool) -> Option<Stop> {
        self.memory.as_ref().and_then(|memory| memory.poison(page, had_contents))
    }

    /// The daemon knows of errors; no claim is open.
    pub fn mark_poisoned(&mut self, errors: &[MemoryError]) -> MarkPoisonedReply {
        let mut reply = MarkPoisonedReply::default();
        for error in errors {
            for page in self.numbering.pages_of_block(Gpa(error.gpa), error.lsb) {
                let note = PoisonInfo { origin: error.origin(), guest_visible: error.guest_visible, hop: error.hop };
                let outcome = self.table.mark_poisoned(page, error.guest_visible);
                let counter = match outcome {
                    PoisonOutcome::New { .. } => &mut reply.marked,
                    PoisonOutcome::Already { .. } => &mut reply.already,
                    PoisonOutcome::Healed => &mut reply.healed,
                    PoisonOutcome::Outside => continue,
                };
                *counter += 1;
                if outcome == PoisonOutcome::Healed {
                    continue;
                }
                match self.resolve_poison(page, note, outcome) {
                    None => {}
                    Some(Stop::AlreadyPresent) => {
                        tracing::warn!(page = page.0, "pager.poison_not_marked");
                        reply.unmarked += 1;
                    }
                    Some(stop) => {
                        // The state is kept; the marker comes with the next fault on the page.
                        tracing::warn!(?stop, page = page.0, "pager.marker_postponed");
                        self.waiting.remove(&page);
                        self.memory.iter().for_each(|m| m.wake(page));
                    }
                }
            }
        }
        reply
    }

    /// A range is given back by the guest (or unmapped): poison stays, everything else reads as zeros.
    pub fn discard(&mut self, start: Hva, end: Hva) {
        let Some(memory) = &mut self.memory else { return };
        for (from, to) in memory.address_map().pages_in(start, end) {
            // What was being installed may be in its file already.
            let missing = self.table.runs(from, to, PageState::is_missing);
            for page in (from.0..to.0).map(PageIndex) {
                let discarded = self.table.mark_discarded(page) == DiscardOutcome::Discarded;
                memory.forget(page);
                if discarded && self.waiting.remove(&page).is_some() {
                    memory.wake(page);
                }
            }
            for (from, to) in missing {
                if memory.is_by_file(from) {
                    memory.drop_contents(from, to);
                }
            }
        }
    }

    /// Runs of pieces of 4 KiB of pages that nobody asked for, or that have come in part.
    pub fn lacking(&self) -> Vec<PageRun> {
        let pieces = |r: &NumberedRegion, (from, to): (PageIndex, PageIndex)| PageRun {
            region: r.number,
            page: (from.0 - r.first.0) * r.pieces(),
            count: (to.0 - from.0) * r.pieces(),
        };
        let absent = |state| state == PageState::Absent;
        let regions = self.numbering.regions().iter();
        let mut lacking: Vec<PageRun> = regions
            .flat_map(|r| self.table.runs(r.first, r.end(), absent).into_iter().map(move |run| pieces(r, run)))
            .collect();
        for page in self.memory.iter().flat_map(Installer::in_part) {
            lacking.extend(self.numbering.region_of(page).map(|r| pieces(r, (page, PageIndex(page.0 + 1)))));
        }
        lacking
    }

    /// Unregisters every range without poison, once nothing is missing; returns the pages that stay guarded.
    ///
    /// # Errors
    /// What the kernel said, for people.
    pub fn complete(&mut self) -> Result<u64, String> {
        if let (Some(memory), false) = (&self.memory, self.unregistered) {
            for region in self.numbering.regions() {
                for (from, to) in self.table.runs(region.first, region.end(), |s| !s.is_poisoned() && !s.is_missing()) {
                    memory.unregister(from, to).map_err(|e| format!("UFFDIO_UNREGISTER: {e}"))?;
                }
            }
            self.unregistered = true;
        }
        Ok(self.table.counts().poisoned())
    }

    /// Where the pages stand.
    pub fn progress(&self) -> PageProgress {
        let counts = self.table.counts();
        PageProgress {
            total: self.table.total(),
            absent: counts.missing(),
            demand: counts.of(PageState::PresentDemand),
            push: counts.of(PageState::PresentPush),
            zero: counts.of(PageState::PresentZero),
            poison: counts.poisoned(),
            discarded: counts.of(PageState::Discarded),
            bytes_received: self.table.word(Word::BytesReceived),
            faults: self.table.word(Word::Faults),
            duplicate_faults: self.table.word(Word::DuplicateFaults),
            machine_checks: self.table.word(Word::MachineChecks),
            first_touch: Some(self.first_touch.summary()),
        }
    }
}
