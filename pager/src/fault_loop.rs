//! The page path of a destination: one thread, one loop.
//!
//! ```text
//!  uffd events ──▶ ask on the demand lane ──▶ reply ──▶ install, which wakes the vCPU
//!   push threads, decoded ──▶ install 64 pages ──▶ look at everything else ──▶ the next 64 …
//! ```
//!
//! Order of attention: uffd events, commands, demand replies, then push. A run that cannot be installed now (events to
//! be read first, no memory) waits in `backlog`, and push is not read meanwhile. When the urgent lane is lost what was
//! asked for is absent again; faults go on being read, and wait until lanes are connected anew.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use crate::attached::AttachedMemory;
use crate::demand::{DemandLane, LaneMessage, Source};
use crate::destination::{Command, Snapshot};
use crate::events::EventLog;
use crate::install::Installer;
use crate::placement::{PageIndex, Placement};
use crate::proto::pager_event::Event as Numbered;
use crate::proto::{AllPresentEvent, FailedEvent, LinkEvent, LinkState, PageRange, PageReply};
use crate::push::{PushLanes, shares};
use crate::region_map::Hva;
use crate::resolver::{FaultOutcome, Resolver};
use crate::run::{Lane, PageRun};
use crate::teller::Teller;
use crate::userfaultfd::{Event, Stop, Userfaultfd, process_started};

/// Pages of push installed before everything else is looked at again.
const SLICE: u64 = 64;
/// Failed attempts of push without a page between them, after which the link counts as lost.
const PUSH_ATTEMPTS: u32 = 3;
/// Before push is tried again.
const PUSH_PAUSE: Duration = Duration::from_millis(100);
/// Before a run that could not be installed is tried again.
const BACKLOG_PAUSE: Duration = Duration::from_millis(1);
/// How often unanswered requests are looked for.
const DEADLINE_CHECK: Duration = Duration::from_millis(50);

type Connected = (Source, Result<DemandLane, Status>, oneshot::Sender<Result<(), Status>>);

/// A userfaultfd as the runtime polls it; the descriptor belongs to the [`Userfaultfd`].
struct Polled(Rc<Userfaultfd>);

impl AsRawFd for Polled {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// The background push.
#[derive(Default)]
struct Push {
    /// Wanted on so many lanes; 0: not wanted.
    lanes: usize,
    open: Option<PushLanes>,
    /// Runs received and not yet installed.
    runs: VecDeque<PageRun>,
    failures: u32,
    /// When to open it (again).
    due: Option<tokio::time::Instant>,
}

/// The loop and all that it owns.
pub struct FaultLoop {
    resolver: Resolver,
    events: EventLog,
    commands: mpsc::UnboundedReceiver<Command>,
    uffd: Option<AsyncFd<Polled>>,
    link: LinkState,
    link_reason: String,
    source: Option<Source>,
    demand: Option<DemandLane>,
    connected: (mpsc::UnboundedSender<Connected>, mpsc::UnboundedReceiver<Connected>),
    push: Push,
    backlog: VecDeque<PageRun>,
    /// Userfaultfds of forked children: held open, or what they have not touched would read as zeros.
    forked: Vec<OwnedFd>,
    failed: Option<String>,
}

enum Wake {
    Command(Option<Command>),
    Connected(Option<Connected>),
    Demand(Option<LaneMessage>),
    Push(Option<LaneMessage>),
    Uffd,
    Tick,
    Slice,
}

async fn or_never<T>(future: Option<impl Future<Output = T>>) -> T {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

impl FaultLoop {
    /// Nothing is attached or connected.
    pub fn new(resolver: Resolver, events: EventLog, commands: mpsc::UnboundedReceiver<Command>) -> Self {
        let link = if resolver.table().counts().missing() == 0 { LinkState::Done } else { LinkState::Idle };
        Self {
            resolver,
            events,
            commands,
            uffd: None,
            link,
            link_reason: String::new(),
            source: None,
            demand: None,
            connected: mpsc::unbounded_channel(),
            push: Push::default(),
            backlog: VecDeque::new(),
            forked: Vec::new(),
            failed: None,
        }
    }

    /// Runs until [`Command::End`], or until nobody can send commands.
    pub async fn run(mut self) {
        loop {
            self.drain_uffd();
            self.settle();
            match self.next().await {
                Wake::Command(None) => return,
                Wake::Command(Some(Command::End(answer))) => {
                    if let Err(error) = self.resolver.table().remove() {
                        tracing::warn!(%error, "pager.page_table_kept");
                    }
                    let _ = answer.send(());
                    return;
                }
                Wake::Command(Some(command)) => self.obey(command),
                Wake::Connected(outcome) => outcome.into_iter().for_each(|outcome| self.link_up(outcome)),
                Wake::Demand(message) => self.demand_message(message),
                Wake::Push(message) => self.push_message(message),
                Wake::Uffd => {}
                Wake::Tick => self.tick(),
                Wake::Slice => self.install_slice(),
            }
        }
    }

    async fn next(&mut self) -> Wake {
        let pushing = !self.push.runs.is_empty() && self.backlog.is_empty() && self.uffd.is_some();
        let reading = self.push.runs.is_empty() && self.backlog.is_empty() && self.uffd.is_some();
        let pause = self.pause();
        let replies = self.demand.as_mut().map(|lane| lane.replies.recv());
        let pushed = self.push.open.as_mut().filter(|_| reading).map(|lanes| lanes.replies.recv());
        let uffd = self.uffd.as_ref();
        tokio::select! {
            biased;
            guard = or_never(uffd.map(|uffd| uffd.readable())) => {
                // Cleared before the events are read: one that comes meanwhile sets it again.
                guard.into_iter().for_each(|mut guard| guard.clear_ready());
                Wake::Uffd
            }
            command = self.commands.recv() => Wake::Command(command),
            outcome = self.connected.1.recv() => Wake::Connected(outcome),
            message = or_never(replies) => Wake::Demand(message),
            () = or_never(pause.map(tokio::time::sleep)) => Wake::Tick,
            message = or_never(pushed) => Wake::Push(message),
            () = or_never(pushing.then(tokio::task::yield_now)) => Wake::Slice,
        }
    }

    /// How long nothing needs to be looked at, if something does at all.
    fn pause(&self) -> Option<Duration> {
        if !self.backlog.is_empty() {
            return Some(BACKLOG_PAUSE);
        }
        let due = self.push.due.map(|due| due.saturating_duration_since(tokio::time::Instant::now()));
        let deadline = (self.demand.is_some() && self.resolver.waiting().next().is_some()).then_some(DEADLINE_CHECK);
        due.into_iter().chain(deadline).min()
    }

    fn tick(&mut self) {
        for _ in 0..self.backlog.len() {
            if let Some(run) = self.backlog.pop_front() {
                self.install(run, u64::MAX);
            }
        }
        if self.push.due.is_some_and(|due| due <= tokio::time::Instant::now()) {
            self.open_push();
        }
        let Some(timeout) = self.source.as_ref().map(|s| s.timeout).filter(|_| self.backlog.is_empty()) else { return };
        let late = self.resolver.waiting().find(|(_, w)| w.asked.is_some_and(|asked| asked.elapsed() > timeout));
        if let (Some((page, _)), true) = (late, self.demand.is_some()) {
            let gpa = self.resolver.numbering().region_of(page).map_or(0, |r| r.gpa_of(page).0);
            self.link_down(format!("no answer for the page at {gpa:#x} in {timeout:?}"));
        }
    }

    // ---- commands ----

    fn obey(&mut self, command: Command) {
        match command {
            Command::Attach(memory, teller, answer) => {
                let _ = answer.send(self.attach(memory, teller));
            }
            Command::HangUp => self.resolver.hang_up(),
            Command::Connect(source, answer) => self.connect(source, answer),
            Command::StartPush(lanes, answer) => {
                let _ = answer.send(self.start_push(lanes));
            }
            Command::Complete(answer) => {
                let _ = answer.send(self.complete());
            }
            Command::MarkPoisoned(errors, answer) => {
                let _ = answer.send(self.resolver.mark_poisoned(&errors));
            }
            Command::Look(answer) => {
                let (link, link_reason) = (self.link, self.link_reason.clone());
                let _ = answer.send(Snapshot { link, link_reason, progress: self.resolver.progress() });
            }
            Command::End(_) => {}
        }
    }

    fn attach(&mut self, memory: AttachedMemory, teller: Option<Teller>) -> Result<(), String> {
        let uffd = memory.uffd.ok_or("uffd: a destination needs one")?;
        let uffd = Rc::new(Userfaultfd::adopt(uffd).map_err(|e| format!("uffd: {e}"))?);
        let (hvas, files) = memory.regions.into_iter().map(|r| (r.hva, r.file)).unzip();
        let placement = Placement::new(self.resolver.numbering().clone(), hvas).ok_or("regions: another number")?;
        // SAFETY: `Polled` holds the descriptor's owner, so it stays open as long as it is registered.
        let polled = unsafe { AsyncFd::register_with_interest(Polled(uffd.clone()), Interest::READABLE) }
            .map_err(|e| format!("uffd: cannot be polled: {e}"))?;
        let started = process_started(memory.vmm_pid);
        self.resolver.attach(memory.vmm_pid, started, Installer::new(uffd, placement, files), teller)?;
        self.uffd = Some(polled);
        Ok(())
    }

    fn connect(&mut self, source: Source, answer: oneshot::Sender<Result<(), Status>>) {
        if self.link == LinkState::Done || (self.demand.is_some() && self.source.as_ref() == Some(&source)) {
            let _ = answer.send(Ok(()));
        } else if self.uffd.is_none() {
            let _ = answer.send(Err(Status::failed_precondition("the VMM has not attached its memory")));
        } else {
            let outcome = self.connected.0.clone();
            tokio::spawn(async move {
                let lane = DemandLane::open(&source).await;
                let _ = outcome.send((source, lane, answer));
            });
        }
    }

    fn link_up(&mut self, (source, lane, answer): Connected) {
        let lane = match lane {
            Ok(lane) => lane,
            Err(status) => {
                let _ = answer.send(Err(status));
                return;
            }
        };
        self.resolver.release_requests();
        self.push.open = None;
        self.demand = Some(lane);
        self.source = Some(source);
        self.set_link(LinkState::Up, String::new());
        let waiting: Vec<_> = self.resolver.waiting().map(|(page, _)| page).collect();
        waiting.into_iter().for_each(|page| self.ask(page));
        self.push.failures = 0;
        self.open_push();
        let _ = answer.send(Ok(()));
    }

    fn start_push(&mut self, lanes: usize) -> Result<(), Status> {
        if self.link == LinkState::Done {
            return Ok(());
        }
        if self.demand.is_none() {
            return Err(Status::failed_precondition(format!("lanes are not connected: {}", self.link_reason)));
        }
        self.push.lanes = lanes;
        if self.push.open.is_none() {
            self.open_push();
        }
        Ok(())
    }

    fn complete(&mut self) -> Result<u64, Status> {
        let missing = self.resolver.table().counts().missing();
        if missing > 0 {
            return Err(Status::failed_precondition(format!("{missing} pages are still absent")));
        }
        self.resolver.complete().map_err(Status::internal)
    }

    // ---- the link ----

    fn set_link(&mut self, state: LinkState, reason: String) {
        tracing::info!(state = state.as_str_name(), reason, "pager.link");
        self.link = state;
        self.link_reason.clone_from(&reason);
        self.events.append(Numbered::Link(LinkEvent { state: state.into(), reason }));
    }

    fn link_down(&mut self, reason: String) {
        self.demand = None;
        self.push.open = None;
        self.push.due = None;
        self.resolver.release_requests();
        if self.link == LinkState::Up {
            self.set_link(LinkState::Down, reason);
        }
    }

    /// After everything that may have brought the last page.
    fn settle(&mut self) {
        if self.link == LinkState::Done || self.resolver.table().counts().missing() > 0 {
            return;
        }
        self.demand = None;
        self.push = Push::default();
        self.set_link(LinkState::Done, String::new());
        self.events.append(Numbered::AllPresent(AllPresentEvent {}));
    }

    fn ask(&mut self, page: PageIndex) {
        let Some(lane) = &self.demand else { return };
        if let (Some(id), true) = (self.resolver.numbering().id_of(page), self.resolver.ask(page)) {
            // A lane that is over says so among its replies, which releases the request.
            lane.ask(PageRange { region: id.region, page: id.page, count: 1 });
        }
    }

    fn demand_message(&mut self, message: Option<LaneMessage>) {
        match message {
            Some(LaneMessage::Opened) => {}
            Some(LaneMessage::Reply(reply)) => match self.runs_of(reply, Lane::Demand) {
                Ok(runs) => runs.into_iter().for_each(|run| self.install(run, u64::MAX)),
                Err(reason) => self.link_down(reason),
            },
            Some(LaneMessage::Ended(Err(status))) => {
                self.link_down(format!("urgent lane: {:?}: {}", status.code(), status.message()));
            }
            Some(LaneMessage::Ended(Ok(()))) | None => self.link_down("the source closed the urgent lane".into()),
        }
    }

    fn runs_of(&self, reply: PageReply, lane: Lane) -> Result<Vec<PageRun>, String> {
        reply.runs.into_iter().map(|run| PageRun::checked(run, self.resolver.numbering(), lane)).collect()
    }

    // ---- push ----

    /// Asks for all that is absent, if push is wanted and there is a link.
    fn open_push(&mut self) {
        self.push.due = None;
        let Some(source) = self.source.as_ref().filter(|_| self.demand.is_some() && self.push.lanes > 0) else {
            return;
        };
        let numbering = self.resolver.numbering();
        let range = |(from, to): (PageIndex, PageIndex)| {
            let id = numbering.id_of(from)?;
            Some(PageRange { region: id.region, page: id.page, count: to.0 - from.0 })
        };
        let lacking: Vec<_> = self.resolver.lacking().into_iter().filter_map(range).collect();
        if lacking.is_empty() {
            // What is still missing was asked for: if its link breaks, push starts again.
            self.push.due = Some(tokio::time::Instant::now() + PUSH_PAUSE);
        } else {
            self.push.open = Some(PushLanes::open(source, shares(&lacking, self.push.lanes)));
        }
    }

    fn push_message(&mut self, message: Option<LaneMessage>) {
        let end = match message {
            Some(LaneMessage::Opened) => return,
            Some(LaneMessage::Reply(reply)) => match self.runs_of(reply, Lane::Push) {
                Ok(runs) => {
                    self.push.failures = 0;
                    self.push.runs.extend(runs);
                    return;
                }
                Err(reason) => return self.link_down(reason),
            },
            Some(LaneMessage::Ended(end)) => end,
            None => Ok(()),
        };
        if let Err(status) = end {
            self.push.failures += 1;
            tracing::warn!(%status, failures = self.push.failures, "pager.push_lane_lost");
            if self.push.failures > PUSH_ATTEMPTS {
                return self.link_down(format!("bulk lane: {:?}: {}", status.code(), status.message()));
            }
        }
        if let Some(lanes) = &mut self.push.open {
            lanes.open = lanes.open.saturating_sub(1);
            if lanes.open == 0 {
                self.push.open = None;
                self.push.due = Some(tokio::time::Instant::now() + PUSH_PAUSE);
            }
        }
    }

    fn install_slice(&mut self) {
        if let Some(run) = self.push.runs.pop_front() {
            self.install(run, SLICE);
        }
    }

    /// Installs up to `most` pages; what is left of a pushed run goes on later, what was stopped goes to the backlog.
    fn install(&mut self, mut run: PageRun, most: u64) {
        match self.resolver.apply(&mut run, most) {
            None if run.count > 0 => self.push.runs.push_front(run),
            None => {}
            Some(Stop::Changing | Stop::NoMemory | Stop::AlreadyPresent) => self.backlog.push_back(run),
            Some(Stop::ProcessGone) => self.memory_gone(),
            Some(Stop::NotRegistered) => self.fail(format!("page {} of the VMM is not registered", run.first.0)),
            Some(Stop::Refused(errno)) => {
                let error = std::io::Error::from_raw_os_error(errno);
                self.fail(format!("page {} cannot be installed: {error}", run.first.0));
            }
        }
    }

    fn memory_gone(&mut self) {
        self.uffd = None;
        self.resolver.drop_memory();
        self.backlog.clear();
        self.push.runs.clear();
        self.fail("the VMM's address space is gone".into());
    }

    /// Says once why pages cannot arrive; goes on serving what it can.
    fn fail(&mut self, reason: String) {
        tracing::error!(reason, "pager.failed");
        if self.failed.as_ref() != Some(&reason) {
            self.failed = Some(reason.clone());
            self.events.append(Numbered::Failed(FailedEvent { reason }));
        }
    }

    // ---- the VMM's events ----

    fn drain_uffd(&mut self) {
        loop {
            let Some(uffd) = &self.uffd else { return };
            match uffd.get_ref().0.read_events() {
                Ok(events) if events.is_empty() => return,
                Ok(events) => events.into_iter().for_each(|event| self.vmm_event(event)),
                Err(error) => {
                    self.uffd = None;
                    return self.fail(format!("the VMM's userfaultfd cannot be read: {error}"));
                }
            }
        }
    }

    fn vmm_event(&mut self, event: Event) {
        match event {
            Event::Fault { at, thread } => self.fault(at, thread),
            Event::Remove { start, end } | Event::Unmap { start, end } => self.resolver.discard(start, end),
            Event::Remap { from, to, size } => {
                self.fail(format!("the VMM moved its memory: {:#x}+{size:#x} to {:#x}", from.0, to.0));
            }
            Event::Fork(fd) if fd >= 0 => {
                // SAFETY: the kernel made the descriptor for the reader of the event, which is us.
                self.forked.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
            Event::Fork(_) | Event::Unknown(_) => tracing::warn!(?event, "pager.unknown_event"),
        }
    }

    fn fault(&mut self, at: Hva, thread: u32) {
        match self.resolver.fault(at, thread) {
            FaultOutcome::Ask(page) => self.ask(page),
            FaultOutcome::Waits | FaultOutcome::Resolved => {}
            FaultOutcome::Again(Stop::ProcessGone) => self.memory_gone(),
            FaultOutcome::Again(stop) => tracing::debug!(?stop, at = at.0, "pager.fault_again"),
            FaultOutcome::Outside => self.fail(format!("a thread waits at {:#x}, outside the layout", at.0)),
        }
    }
}
