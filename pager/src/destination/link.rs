//! The link to the source: the urgent lane, the bulk lanes, and the requests that wait for replies.
//!
//! While a vCPU waits and the urgent lane is silent, the link dials the source a second time: a network that comes back
//! after an outage, or one that forgot a connection, carries a new one at once. Pages are then requested again.
//!
//! When the link is lost, requested pages are ABSENT again. The fault thread still reads faults; they wait until lanes are connected anew.

use std::io::Write;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::destination::error::LinkError;
use crate::destination::lanes::bulk_lanes::{BulkEvent, BulkLanes, BulkOutcome};
use crate::destination::lanes::receiver::{LaneReceiver, Step};
use crate::destination::pages::shared_pages::SharedPages;
use crate::event_log::EventLog;
use crate::lane::connect::{ConnectError, SourceAddress, SourceConnection};
use crate::lane::frame::Ask;
use crate::layout::address_map::PageIndex;
use crate::layout::page_run::LaneKind;
use crate::proto::pager_event::Event;
use crate::proto::{AllPresentEvent, LinkEvent, LinkState};
use crate::sys::userfaultfd::Stop;

/// How often silence is looked for.
const SILENCE_CHECK: Duration = Duration::from_millis(50);
/// The source is dialled again after this part of the demand time-out.
const REDIAL_PART: u32 = 4;
/// To connect takes some round trips; the time-out of a redial is no shorter.
const MIN_REDIAL_TIMEOUT: Duration = Duration::from_secs(3);

/// What a look at the urgent lane found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// Nothing was there.
    Nothing,
    /// Bytes came, or the lane ended.
    Progress,
    /// A frame cannot be installed now.
    Stopped(Stop),
}

/// A fault of the push.
#[derive(Debug, PartialEq, Eq)]
pub enum Trouble {
    /// A frame cannot be installed.
    Stopped(Stop),
    /// No lane of the push brings a page, for this reason.
    PushFails(String),
}

/// The link and its lanes.
pub struct Link {
    shared: Arc<SharedPages>,
    events: EventLog,
    state: LinkState,
    reason: String,
    source: Option<SourceConnection>,
    urgent: Option<LaneReceiver>,
    /// Whether the urgent lane may have bytes.
    urgent_readable: bool,
    bulk: BulkLanes,
    /// When silence is looked for next.
    next_check: Instant,
    /// Whether the urgent lane brought bytes since the last look.
    heard: bool,
    /// Since when a page is requested and the urgent lane brings nothing.
    silent_since: Option<Instant>,
    /// Dials the source again, on a thread of the runtime.
    redial: Redial,
    /// No second connection is tried before.
    next_redial: Instant,
    /// A second connection is being tried.
    redialling: bool,
}

/// A second connection to a source, and its urgent lane.
pub type Redialled = Result<(SourceConnection, TcpStream), ConnectError>;

/// Starts to connect; the result comes back by [`Link::redialled`].
pub type Redial = Box<dyn Fn(SourceAddress) + Send>;

impl Link {
    /// No lane is connected.
    pub fn new(shared: Arc<SharedPages>, events: EventLog, bulk: BulkLanes, redial: Redial) -> Self {
        let missing = shared.lock().table().counts().missing();
        let state = if missing == 0 { LinkState::Done } else { LinkState::Idle };
        Self {
            shared,
            events,
            state,
            reason: String::new(),
            source: None,
            urgent: None,
            urgent_readable: false,
            bulk,
            next_check: Instant::now(),
            heard: false,
            silent_since: None,
            redial,
            next_redial: Instant::now(),
            redialling: false,
        }
    }

    /// The state, and why it is so.
    pub fn state(&self) -> (LinkState, &str) {
        (self.state, &self.reason)
    }

    /// Whether connecting to this source would change nothing.
    pub fn needs_no_connection(&self, source: &SourceAddress) -> bool {
        let same = self.urgent.is_some() && self.source.as_ref().is_some_and(|s| s.source == *source);
        self.state == LinkState::Done || same
    }

    /// Takes a connected urgent lane; the push starts again if it is wanted.
    pub fn connected(&mut self, source: SourceConnection, stream: TcpStream) {
        self.silent_since = None;
        self.replace_lanes(source, stream);
    }

    fn replace_lanes(&mut self, source: SourceConnection, stream: TcpStream) {
        self.drop_lanes();
        self.urgent = Some(LaneReceiver::new(stream, LaneKind::Urgent));
        self.source = Some(source);
        if self.state != LinkState::Up {
            self.set_state(LinkState::Up, String::new());
        }
        self.request_unrequested();
        self.bulk.forget_failures();
        self.open_bulk();
    }

    /// Takes a second connection, if the first is still silent.
    pub fn redialled(&mut self, result: Redialled) {
        self.redialling = false;
        let Some(source) = self.source.as_ref().filter(|_| self.state == LinkState::Up) else { return };
        self.next_redial = Instant::now() + source.source.demand_timeout / REDIAL_PART;
        match result {
            Ok((again, stream)) if self.silent_since.is_some() && again.source.is_that_of(&source.source) => {
                tracing::warn!("pager.lanes_redialled");
                // The time-outs stay those of the daemon.
                let again = again.with_address(source.source.clone());
                self.replace_lanes(again, stream);
            }
            Ok(_) => {}
            Err(error) => tracing::info!(%error, "pager.redial_failed"),
        }
    }

    /// Starts the push on this many lanes.
    ///
    /// # Errors
    /// [`LinkError::NotConnected`].
    pub fn start_push(&mut self, lanes: usize) -> Result<(), LinkError> {
        if self.state == LinkState::Done {
            return Ok(());
        }
        if self.urgent.is_none() {
            return Err(LinkError::NotConnected { reason: self.reason.clone() });
        }
        self.bulk.wanted = lanes;
        if self.bulk.is_closed() {
            self.open_bulk();
        }
        Ok(())
    }

    /// Ends the push: pages can be installed no more.
    pub fn stop_push(&mut self) {
        self.bulk.close();
        self.bulk.wanted = 0;
    }

    /// CPU time that bulk lanes have worked; `None`: none is open.
    pub fn push_work(&self) -> Option<Duration> {
        self.bulk.is_open().then(|| self.shared.worked())
    }

    fn set_state(&mut self, state: LinkState, reason: String) {
        tracing::info!(state = state.as_str_name(), reason, "pager.link");
        self.state = state;
        self.reason.clone_from(&reason);
        self.events.append(Event::Link(LinkEvent { state: state.into(), reason }));
    }

    fn lose(&mut self, reason: String) {
        self.drop_lanes();
        if self.state == LinkState::Up {
            self.set_state(LinkState::Down, reason);
        }
    }

    /// Closes all lanes: pages that were requested, or came in part, are absent again.
    fn drop_lanes(&mut self) {
        self.urgent = None;
        self.urgent_readable = false;
        self.bulk.close();
        self.shared.lock().release_requests();
    }

    /// Closes the link if no page is missing. To be called after anything that may have brought the last page.
    pub fn finish_if_complete(&mut self) {
        if self.state == LinkState::Done || self.shared.lock().table().counts().missing() > 0 {
            return;
        }
        self.drop_lanes();
        self.bulk.wanted = 0;
        let receive_mappings = self.shared.lock().take_receive_mappings();
        // On a thread of its own: unmapping takes long, and a vCPU may touch a poisoned page any time.
        let _ = std::thread::Builder::new().name("unmap".into()).spawn(move || drop(receive_mappings));
        self.set_state(LinkState::Done, String::new());
        self.events.append(Event::AllPresent(AllPresentEvent {}));
    }

    /// Requests a page on the urgent lane, if there is one and the page is not on its way.
    pub fn request(&mut self, page: PageIndex) {
        let Some(lane) = &self.urgent else { return };
        let ask = self.shared.lock().ask(page);
        let Some(ask) = ask else { return };
        if let Err(error) = send(lane, ask) {
            self.lose(format!("urgent lane: {error}"));
        }
    }

    fn request_unrequested(&mut self) {
        let unasked = self.shared.lock().unasked();
        unasked.into_iter().for_each(|page| self.request(page));
    }

    /// Whether a reply is due.
    pub fn awaits_reply(&self) -> bool {
        self.urgent.is_some() && self.shared.lock().waiting().next().is_some()
    }

    /// Whether the urgent lane is known to have bytes.
    pub fn is_readable(&self) -> bool {
        self.urgent_readable
    }

    /// The urgent lane may have bytes.
    pub fn note_readable(&mut self) {
        self.urgent_readable = true;
    }

    /// The urgent lane, to poll.
    pub fn urgent_fd(&self) -> Option<BorrowedFd<'_>> {
        self.urgent.as_ref().map(AsFd::as_fd)
    }

    /// Receives and installs at most one frame of the urgent lane.
    pub fn receive_urgent(&mut self) -> Received {
        let Some(lane) = self.urgent.as_mut().filter(|_| self.urgent_readable) else { return Received::Nothing };
        let step = lane.step(&self.shared);
        self.urgent_readable = match step {
            Step::Nothing => false,
            Step::Progress => lane.has_more(),
            _ => true,
        };
        match step {
            Step::Nothing => return Received::Nothing,
            Step::Stopped(stop) => return Received::Stopped(stop),
            Step::Progress => self.heard = true,
            Step::Ended => self.lose("the source closed the urgent lane".into()),
            Step::Broken(failure) => self.lose(format!("urgent lane: {failure}")),
        }
        Received::Progress
    }

    /// Opens bulk lanes for the absent pages, if the push is wanted and there is a link.
    fn open_bulk(&mut self) {
        if let Some(source) = self.source.as_ref().filter(|_| self.urgent.is_some()) {
            let lacking = self.shared.lock().lacking();
            self.bulk.open(source, lacking);
        }
    }

    /// Handles an event of a bulk lane; returns its fault, if it has one. Demand goes its own way.
    pub fn bulk_event(&mut self, event: BulkEvent) -> Option<Trouble> {
        match self.bulk.event(event) {
            BulkOutcome::GoesOn => {}
            BulkOutcome::Stopped(stop) => return Some(Trouble::Stopped(stop)),
            BulkOutcome::Untrusted(failure) => self.lose(format!("bulk lane: {failure}")),
            BulkOutcome::Lost(failure) => {
                let failing = self.bulk.is_failing();
                tracing::warn!(reason = %failure, failing, "pager.bulk_lane_lost");
                if failing {
                    return Some(Trouble::PushFails(format!("the push fails and is tried again: {failure}")));
                }
            }
        }
        None
    }

    /// Reopens bulk lanes when it is time. Dials again, and at last loses the link, when the urgent lane is silent while a
    /// page is requested. `stopped`: a frame cannot be installed, so the lane is silent through no fault of the source.
    pub fn check_timers(&mut self, stopped: bool) {
        if self.state != LinkState::Up {
            return;
        }
        let now = Instant::now();
        if self.bulk.is_due(now) {
            self.open_bulk();
        }
        if now < self.next_check {
            return;
        }
        self.next_check = now + SILENCE_CHECK;
        self.request_unrequested();
        let heard = std::mem::take(&mut self.heard);
        self.silent_since = match self.silent_since {
            _ if stopped || !self.awaits_reply() => None,
            Some(since) if !heard => Some(since),
            _ => Some(now),
        };
        if let Some(since) = self.silent_since {
            self.bear_silence(now, now.saturating_duration_since(since));
        }
    }

    fn bear_silence(&mut self, now: Instant, silence: Duration) {
        let Some(source) = self.source.as_ref().map(|s| &s.source) else { return };
        let timeout = source.demand_timeout;
        if silence > timeout {
            let page = self.shared.lock().waiting().next().map(|(page, _)| page);
            let gpa = page.and_then(|page| Some(self.shared.lock().numbering().region_of(page)?.gpa_of(page).0));
            let gpa = gpa.unwrap_or_default();
            self.lose(format!("the source sent nothing in {timeout:?}, and a vCPU waits for the page at {gpa:#x}"));
        } else if silence >= timeout / REDIAL_PART && !self.redialling && now >= self.next_redial {
            self.redialling = true;
            let connect_timeout = MIN_REDIAL_TIMEOUT.max(timeout / REDIAL_PART).min(source.connect_timeout);
            (self.redial)(SourceAddress { connect_timeout, ..source.clone() });
        }
    }

    /// How long the fault thread may sleep before it must call [`Self::check_timers`]; `None`: for ever.
    pub fn next_timer(&self) -> Option<Duration> {
        let deadline = self.awaits_reply().then_some(SILENCE_CHECK);
        self.bulk.due_in(Instant::now()).into_iter().chain(deadline).min()
    }
}

/// Sends a request. The socket does not block: a source that leaves thousands of requests unread is as good as gone.
fn send(lane: &LaneReceiver, ask: Ask) -> std::io::Result<()> {
    lane.stream().write_all(&ask.encode())
}
