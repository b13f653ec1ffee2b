//! Reports of poisoned pages: first a frame to the VMM, then, behind the vCPU, the doorbell and an event for the daemon.

use std::collections::HashMap;
use std::io;

use crate::destination::page_table::PageTable;
use crate::destination::page_table::file::Word;
use crate::event_log::{EventLog, now_us};
use crate::layout::Hva;
use crate::layout::address_map::{PageIndex, PageNumbering};
use crate::layout::page_run::PoisonInfo;
use crate::proto::pager_event::Event;
use crate::proto::{ErrorOrigin, MemoryError, MemoryErrorEvent, Severity};
use crate::sched::priority;
use crate::vmm::notifier::VmmNotifier;

/// The smallest page is of 2^12 bytes.
const SMALLEST_LSB: u32 = 12;

/// The receivers of reports, and the facts that the source sent about poisoned pages.
#[derive(Debug)]
pub struct PoisonReporter {
    notifier: Option<VmmNotifier>,
    events: EventLog,
    infos: HashMap<PageIndex, PoisonInfo>,
}

impl PoisonReporter {
    /// No VMM is attached.
    pub fn new(events: EventLog) -> Self {
        Self { notifier: None, events, infos: HashMap::new() }
    }

    /// The daemon's events.
    pub fn events(&self) -> &EventLog {
        &self.events
    }

    /// Tells the VMM that its memory is accepted, and reports to it from now on. Without a notifier the VMM hears nothing.
    ///
    /// # Errors
    /// The VMM does not take the frame.
    pub fn attach(&mut self, notifier: Option<VmmNotifier>) -> io::Result<()> {
        notifier.as_ref().map_or(Ok(()), VmmNotifier::attached)?;
        self.notifier = notifier;
        Ok(())
    }

    /// Whether the VMM takes its machine checks from the kernel, and tells nothing by itself.
    pub fn kernel_tells(&self) -> bool {
        self.notifier.as_ref().is_some_and(|notifier| !notifier.reaches_vmm(false))
    }

    /// The page is poison no longer.
    pub fn forget(&mut self, page: PageIndex) {
        self.infos.remove(&page);
    }

    /// The VMM hung up.
    pub fn hang_up(&mut self) {
        self.notifier = None;
    }

    /// A page became poison. The daemon gets an event at once if the guest knew of it before it came here: no report follows.
    pub fn learn(&mut self, numbering: &PageNumbering, page: PageIndex, hva: Hva, info: PoisonInfo) {
        self.infos.insert(page, info);
        if info.guest_visible {
            self.events.append_quietly(Event::MemoryError(self.event(numbering, page, hva, Severity::Unspecified, 0)));
        }
    }

    /// Reports a poisoned page to the VMM, once. `waits`: the thread that waits on it, if one does. Returns the event for
    /// [`Self::publish`].
    #[must_use]
    pub fn report(
        &self,
        table: &mut PageTable,
        numbering: &PageNumbering,
        (page, hva): (PageIndex, Hva),
        waits: Option<u32>,
    ) -> Option<MemoryErrorEvent> {
        if self.notifier.as_ref().is_some_and(|notifier| !notifier.reaches_vmm(waits.is_some())) {
            return Some(self.event(numbering, page, hva, Severity::Unspecified, 0));
        }
        if !table.mark_told(page) {
            return None;
        }
        let severity = if waits.is_some() { Severity::ActionRequired } else { Severity::ActionOptional };
        let mut event = self.event(numbering, page, hva, severity, waits.unwrap_or(0));
        event.reported = match self.notifier.as_ref().map(|notifier| notifier.memory_error(&event)) {
            Some(Ok(())) => {
                table.add(Word::MachineChecks, 1);
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

    /// Rings the VMM's doorbell and logs the event. The vCPU goes first: it may wait for this CPU.
    pub fn publish(&self, reported: Option<MemoryErrorEvent>) {
        if let Some(event) = reported {
            priority::yield_cpu();
            self.notifier.iter().for_each(VmmNotifier::notify);
            self.events.append_quietly(Event::MemoryError(event));
        }
    }

    fn event(
        &self,
        numbering: &PageNumbering,
        page: PageIndex,
        hva: Hva,
        severity: Severity,
        thread_id: u32,
    ) -> MemoryErrorEvent {
        let region = numbering.region_of(page);
        let unknown = PoisonInfo { origin: ErrorOrigin::Read, guest_visible: false, hop: 0 };
        let info = self.infos.get(&page).copied().unwrap_or(unknown);
        let now = now_us();
        let error = MemoryError {
            gpa: region.map_or(0, |r| r.gpa_of(page).0),
            lsb: region.map_or(SMALLEST_LSB, |r| r.lsb()),
            origin: info.origin.into(),
            severity: severity.into(),
            guest_visible: info.guest_visible,
            hop: info.hop,
            count: 1,
            first_seen_us: now,
            last_seen_us: now,
            ..MemoryError::default()
        };
        MemoryErrorEvent { error: Some(error), hva: hva.0, thread_id, reported: false }
    }
}
