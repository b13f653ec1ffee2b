//! What a fault, an arrived run, a REMOVE and a known error do: synchronous, no network. It is
//! behind a lock ([`crate::destination::pages::shared_pages::SharedPages`]).
//!
//! A page that is resolved as poison is reported first (frame to the VMM), then marked, which wakes the vCPU; then whoever
//! else is to know of it is woken. `POISONED_TOLD` is written before the frame is sent, so no page is reported twice.

pub mod given_back;

use std::sync::Arc;

use crate::destination::error::{AttachError, CompleteError};
use crate::destination::memory::claim::{BAD_FRAME, Claim};
use crate::destination::memory::installer::Installer;
use crate::destination::memory::receive_mapping::ReceiveMapping;
use crate::destination::page_table::file::Word;
use crate::destination::page_table::{PageState, PageTable, PoisonOutcome};
use crate::destination::pages::poison_report::PoisonReporter;
use crate::destination::pages::resolver::given_back::DroppedMarkers;
use crate::destination::pages::waiting::{Waiting, WaitingPages};
use crate::event_log::EventLog;
use crate::lane::frame::Ask;
use crate::layout::PAGE_SIZE;
use crate::layout::address_map::{NumberedRegion, PageIndex, PageNumbering};
use crate::layout::page_run::{LaneKind, PageRun, PoisonInfo};
use crate::layout::{Gpa, Hva};
use crate::proto::{ErrorOrigin, MarkPoisonedReply, MemoryError, MemoryErrorEvent, PageProgress};
use crate::sys::userfaultfd::Stop;
use crate::vmm::notifier::VmmNotifier;

/// What a fault needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultOutcome {
    /// The page must be asked for.
    Ask(PageIndex),
    /// It was asked for already.
    Waits,
    /// It is poison that the VMM may have replaced: the thread waits for a word of that.
    Held,
    /// Woken: data, zeros or a marker are there.
    Resolved,
    /// Woken for another try: the ioctl could not be done now.
    Again(Stop),
    /// No page of the layout.
    Outside,
}

/// A frame of pages that are not in the layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the source sent region {} pages {}+{} of 4 KiB, outside the layout", .0.region, .0.page, .0.count)]
pub struct OutsideLayout(PageRun);

/// The pages of a destination VM.
#[derive(Debug)]
pub struct Resolver {
    numbering: PageNumbering,
    table: PageTable,
    memory: Option<Installer>,
    reporter: PoisonReporter,
    waiting: WaitingPages,
    dropped: DroppedMarkers,
    /// First page of each claim that is not settled, and one past its last.
    open: Vec<(PageIndex, PageIndex)>,
    unregistered: bool,
}

impl Resolver {
    /// No memory is attached yet.
    pub fn new(numbering: PageNumbering, table: PageTable, events: EventLog) -> Self {
        Self {
            numbering,
            table,
            memory: None,
            reporter: PoisonReporter::new(events),
            waiting: WaitingPages::default(),
            dropped: DroppedMarkers::default(),
            open: Vec::new(),
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

    /// The daemon's events.
    pub fn events(&self) -> &EventLog {
        self.reporter.events()
    }

    /// The memory, if one is attached.
    pub fn memory(&self) -> Option<&Installer> {
        self.memory.as_ref()
    }

    /// Takes the VMM's memory: its poison gets its markers, threads that wait try again.
    ///
    /// # Errors
    /// The memory is of another VMM, or the VMM does not take the answer; it is not told `attached` then.
    pub fn attach(
        &mut self,
        pid: u32,
        started: u64,
        memory: Installer,
        notifier: Option<VmmNotifier>,
    ) -> Result<(), AttachError> {
        if !self.table.bind(pid, started) {
            return Err(AttachError::ForeignTable { pid });
        }
        self.reporter.attach(notifier).map_err(AttachError::Unanswered)?;
        self.memory = Some(memory);
        for page in self.poisoned_pages() {
            let reported = self.report(page, None);
            self.mark(page, true);
            self.reporter.publish(reported);
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
    pub fn claim_in_place(&mut self, pages: PageRun, lane: LaneKind) -> Option<Claim> {
        let claim = self.memory.as_ref()?.claim_in_place(&mut self.table, pages, lane)?;
        self.open.push(claim.range());
        Some(claim)
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
            for page in self.waiting.in_range(from, to) {
                // It may have been copied and gone again (reclaimed), to be faulted on anew: then nobody was woken.
                if self.waiting.get(page).is_some_and(|waiting| waiting.since >= claim.began()) {
                    self.memory.iter().for_each(|memory| memory.wake(page));
                }
            }
            self.waiting.finish(from, to);
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
        self.reporter.hang_up();
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
            if !self.waiting.begin(page, thread) {
                self.table.add(Word::DuplicateFaults, 1);
                return FaultOutcome::Waits;
            }
            return FaultOutcome::Ask(page);
        }
        if state.is_poisoned() && self.holds(page, thread) {
            return FaultOutcome::Held;
        }
        let stop = match &mut self.memory {
            _ if state.is_poisoned() => self.touch_poison(page, thread),
            Some(memory) => memory.refill(page, minor),
            None => None,
        };
        let stop = match stop {
            Some(BAD_FRAME) if self.waiting.begin(page, thread) => self.lose(page),
            stop => stop,
        };
        match stop {
            None => FaultOutcome::Resolved,
            Some(stop) => {
                self.waiting.give_up(page);
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
        self.waiting.note_requested(page);
        Some(ask)
    }

    /// Pages on which somebody waits, and which nobody was asked for.
    pub fn unasked(&self) -> Vec<PageIndex> {
        let absent = |page: &PageIndex| self.table.state(*page) == Some(PageState::Absent);
        self.waiting.iter().map(|(page, _)| page).filter(absent).collect()
    }

    /// Pages on which somebody waits.
    pub fn waiting(&self) -> impl Iterator<Item = (PageIndex, Waiting)> + '_ {
        self.waiting.iter()
    }

    /// The link is lost: what was asked for, or has come in part, is absent again; who waits goes on waiting.
    pub fn release_requests(&mut self) {
        if let Some(memory) = &mut self.memory {
            memory.abandon(&mut self.table);
        }
        for (page, _) in self.waiting.iter() {
            self.table.release_request(page);
        }
        self.waiting.forget_requests();
    }

    /// Checks that a frame's pages lie in the layout.
    ///
    /// # Errors
    /// [`OutsideLayout`].
    pub fn check(&self, pages: PageRun) -> Result<(), OutsideLayout> {
        let region = self.numbering.regions().get(pages.region as usize);
        let end = pages.page.checked_add(pages.count);
        match region.zip(end).is_some_and(|(region, end)| end <= region.region.size / PAGE_SIZE) {
            true => Ok(()),
            false => Err(OutsideLayout(pages)),
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
            self.waiting.finish(from, to);
        }
        installed.stop
    }

    /// Zeros came. After a stop, to be called again.
    pub fn zeros(&mut self, pages: PageRun, lane: LaneKind) -> Option<Stop> {
        let Some(memory) = &mut self.memory else { return Some(Stop::ProcessGone) };
        let installed = memory.zeros(&mut self.table, pages, lane);
        for (from, to) in &installed.runs {
            for page in self.waiting.in_range(*from, *to) {
                // Where it cannot be made now, whoever waits faults anew.
                if self.table.state(page) == Some(PageState::PresentZero)
                    && let Some(memory) = &self.memory
                    && memory.make_zero(page).is_some()
                {
                    memory.wake(page);
                }
            }
        }
        for (from, to) in installed.runs {
            self.waiting.finish(from, to);
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
            self.reporter.learn(&self.numbering, page, self.hva_of(page), note);
        }
        let waits = self.waiting.get(page).map(|w| w.thread);
        let reported = self.report(page, waits);
        let mut had_contents = false;
        if let (PoisonOutcome::New { was, .. }, Some(memory)) = (outcome, &mut self.memory) {
            memory.forget(page);
            had_contents = was.is_present();
        }
        let stop = self.mark(page, had_contents);
        if stop.is_none() {
            self.waiting.finish(page, PageIndex(page.0 + 1));
        }
        self.reporter.publish(reported);
        stop
    }

    /// A frame of this host went bad under a page that came, before the VMM mapped it: the page is poison from now on.
    pub fn lose(&mut self, page: PageIndex) -> Option<Stop> {
        let outcome = self.table.mark_lost(page)?;
        tracing::warn!(page = page.0, "pager.bad_frame");
        let note = PoisonInfo { origin: ErrorOrigin::Destination, guest_visible: false, hop: 0 };
        self.resolve_poison(page, note, outcome)
    }

    /// Reports a poisoned page to the VMM. Before a VMM is attached nothing is reported: attaching does it.
    #[must_use]
    fn report(&mut self, page: PageIndex, waits: Option<u32>) -> Option<MemoryErrorEvent> {
        self.memory.as_ref()?;
        let hva = self.hva_of(page);
        self.reporter.report(&mut self.table, &self.numbering, (page, hva), waits)
    }

    /// Address of a page's first byte in the VMM; 0 while no memory is attached.
    fn hva_of(&self, page: PageIndex) -> Hva {
        self.memory.as_ref().and_then(|m| m.address_map().address_of(page)).map_or(Hva(0), |(hva, _)| hva)
    }

    fn mark(&mut self, page: PageIndex, had_contents: bool) -> Option<Stop> {
        let stop = self.memory.as_ref().and_then(|memory| memory.poison(page, had_contents));
        if stop.is_none() {
            self.dropped.marked(page);
        }
        stop
    }

    fn touch_poison(&mut self, page: PageIndex, thread: u32) -> Option<Stop> {
        let reported = self.report(page, Some(thread));
        let stop = self.mark(page, false);
        self.reporter.publish(reported);
        stop
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
                        self.waiting.give_up(page);
                        self.memory.iter().for_each(|m| m.wake(page));
                    }
                }
            }
        }
        reply
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

    /// Unregisters every range without poison; returns the number of pages that stay guarded.
    ///
    /// # Errors
    /// [`CompleteError`]: a page is missing, or the kernel refuses.
    pub fn complete(&mut self) -> Result<u64, CompleteError> {
        let missing = self.table.counts().missing();
        if missing > 0 {
            return Err(CompleteError::Absent { missing });
        }
        if let (Some(memory), false) = (&self.memory, self.unregistered) {
            for region in self.numbering.regions() {
                for (from, to) in self.table.runs(region.first, region.end(), |s| !s.is_poisoned() && !s.is_missing()) {
                    memory.unregister(from, to).map_err(CompleteError::Unregister)?;
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
            ..self.waiting.progress()
        }
    }
}
