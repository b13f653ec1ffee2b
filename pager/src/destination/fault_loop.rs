//! The page path of a destination: one thread, one loop.
//!
//! ```text
//!  uffd events ──▶ ask on the urgent lane ──▶ frame ──▶ install, which wakes the vCPU
//! ```
//!
//! Order of attention: the urgent lane, uffd events, commands. What is pushed comes by threads of its own
//! ([`crate::destination::lanes::bulk_lane`]). Behind whatever it did the thread gives way to whoever waits for its core; where nothing was there
//! it spins for a moment, giving way too, then sleeps in poll(2). While there is a heavy push it runs before all others, so it
//! does neither, and looks only where poll(2) says that there is something. When the urgent lane is lost what was asked for is absent again; faults go on being read, and wait until lanes are
//! connected anew.

use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use tonic::Status;

use crate::destination::command::{Command, Snapshot};
use crate::destination::lanes::bulk_lane::LaneReport;
use crate::destination::lanes::bulk_lanes::BulkLanes;
use crate::destination::lanes::receiver::{INSTALL_RETRY_DELAY, LaneReceiver, Step};
use crate::destination::memory::collapse::collapse_all;
use crate::destination::memory::installer::{Installer, RegionBacking};
use crate::destination::memory::preallocate::PreallocateTarget;
use crate::destination::pages::resolver::FaultOutcome;
use crate::destination::pages::shared_pages::SharedPages;
use crate::event_log::EventLog;
use crate::lane::connect::SourceConnection;
use crate::lane::frame::Ask;
use crate::layout::Hva;
use crate::layout::PAGE_SIZE;
use crate::layout::address_map::{AddressMap, NumberedRegion, PageIndex};
use crate::layout::page_run::LaneKind;
use crate::proto::pager_event::Event as PagerEvent;
use crate::proto::{AllPresentEvent, FailedEvent, LinkEvent, LinkState};
use crate::sched::adaptive_spin::AdaptiveSpin;
use crate::sched::cpu_latency::CpuLatencyRequest;
use crate::sched::priority;
use crate::sched::push_load::PushLoad;
use crate::sys::doorbell::Doorbell;
use crate::sys::procfs::process_started;
use crate::sys::userfaultfd::{MAX_EVENTS_A_READ, Stop, UffdEvent, Userfaultfd};
use crate::tuning::Tuning;
use crate::vmm::attached_memory::{AttachedMemory, AttachedRegion};
use crate::vmm::notifier::VmmNotifier;

/// An answer is sure to come, a fault is not: it is worth so many times as long a spin.
const ANSWER: u32 = 3;
/// How often unanswered requests are looked for.
const DEADLINE_CHECK: Duration = Duration::from_millis(50);

/// The loop and all that it owns.
pub struct FaultLoop {
    shared: Arc<SharedPages>,
    events: EventLog,
    commands: Receiver<Command>,
    doorbell: Arc<Doorbell>,
    /// Of the VMM's memory; none: there is no memory.
    uffds: Vec<Arc<Userfaultfd>>,
    link: LinkState,
    link_reason: String,
    source: Option<SourceConnection>,
    urgent: Option<LaneReceiver>,
    /// It may have something.
    urgent_has: bool,
    /// One of them may have something.
    uffds_have: bool,
    bulk: BulkLanes,
    tuning: Tuning,
    /// For what has been asked for.
    for_answer: AdaptiveSpin,
    /// For a fault, while nothing has been asked for.
    for_fault: AdaptiveSpin,
    /// Of the push, while there is one.
    push_load: Option<PushLoad>,
    /// Nobody puts this thread aside.
    is_realtime: bool,
    cpu_latency: CpuLatencyRequest,
    /// When unanswered requests are looked for next.
    check: Instant,
    /// A frame waits for events to be read, or for memory.
    stopped: bool,
    /// Userfaultfds of forked children: held open, or what they have not touched would read as zeros.
    forked: Vec<OwnedFd>,
    failed: Option<String>,
    /// Process and ranges to be made of huge pages after the end, where the VMM asked for it.
    to_collapse: Option<(u32, Vec<(Hva, u64)>)>,
    /// The VMM's files are written to by somebody else.
    allocating: bool,
}

impl FaultLoop {
    /// Nothing is attached or connected.
    pub fn new(
        shared: Arc<SharedPages>,
        events: EventLog,
        commands: Receiver<Command>,
        doorbell: Arc<Doorbell>,
        bulk: BulkLanes,
        tuning: Tuning,
    ) -> Self {
        let link = if shared.lock().table().counts().missing() == 0 { LinkState::Done } else { LinkState::Idle };
        Self {
            shared,
            events,
            commands,
            doorbell,
            uffds: Vec::new(),
            link,
            link_reason: String::new(),
            source: None,
            urgent: None,
            bulk,
            for_answer: AdaptiveSpin::new(tuning.spin * ANSWER),
            for_fault: AdaptiveSpin::new(tuning.spin),
            cpu_latency: CpuLatencyRequest::new(tuning.keep_awake),
            tuning,
            urgent_has: false,
            uffds_have: true,
            push_load: None,
            is_realtime: false,
            check: Instant::now(),
            stopped: false,
            forked: Vec::new(),
            failed: None,
            to_collapse: None,
            allocating: false,
        }
    }

    /// Runs until [`Command::End`], or until nobody can send commands.
    pub fn run(mut self) {
        loop {
            self.stopped = false;
            let answered = self.take_urgent();
            if answered {
                self.yield_cpu();
            }
            let mut busy = self.drain_uffds();
            loop {
                match self.commands.try_recv() {
                    Ok(Command::End(answer)) => {
                        self.events.wake_watchers();
                        let removed = self.shared.lock().table().remove();
                        if let Err(error) = removed {
                            tracing::warn!(%error, "pager.page_table_kept");
                        }
                        let _ = answer.send(());
                        return;
                    }
                    Ok(command) => self.handle_command(command),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
                busy = true;
            }
            self.finish_if_complete();
            self.update_thread_class();
            self.check_timers();
            self.events.wake_watchers();
            if answered || busy {
                self.for_answer.found_work();
                self.for_fault.found_work();
                if busy {
                    self.yield_cpu();
                }
                if !self.is_realtime || self.urgent_has {
                    self.recheck_all();
                    continue;
                }
            } else if self.looks_again() {
                self.yield_cpu();
                self.recheck_all();
                continue;
            }
            self.sleep();
        }
    }

    /// Next, without having slept. An answer is looked for where one is due; that a lane ends, or says why it cannot go on, is
    /// found by the next sleep.
    fn recheck_all(&mut self) {
        self.uffds_have = true;
        self.urgent_has |= self.awaits_answer();
    }

    /// What was asked for may have to be read on this core, and a vCPU that was woken may wait for it.
    fn yield_cpu(&self) {
        if !self.is_realtime {
            priority::yield_cpu();
        }
    }

    fn awaits_answer(&self) -> bool {
        self.urgent.is_some() && self.shared.lock().waiting().next().is_some()
    }

    /// Whether to spin, where nothing was there.
    fn looks_again(&mut self) -> bool {
        let spin = if self.awaits_answer() { &mut self.for_answer } else { &mut self.for_fault };
        !self.is_realtime && spin.should_spin(Instant::now())
    }

    /// Before all others while there is a heavy push, and only then.
    fn update_thread_class(&mut self) {
        let heavy = if self.bulk.is_open() {
            let (now, worked) = (Instant::now(), self.shared.worked());
            self.push_load.get_or_insert_with(|| PushLoad::new(now, worked)).is_heavy(now, worked)
        } else {
            self.push_load = None;
            false
        };
        if heavy != self.shared.is_heavy() {
            self.shared.set_heavy(heavy);
            self.is_realtime = heavy && self.tuning.enter_heavy_push();
            if !heavy {
                self.tuning.leave_heavy_push();
            }
        }
    }

    /// Until something comes, or it is time to look at the clock.
    fn sleep(&mut self) {
        let timeout = match self.stopped {
            true => Some(INSTALL_RETRY_DELAY),
            false => {
                let deadline = self.awaits_answer().then_some(DEADLINE_CHECK);
                self.bulk.due_in(Instant::now()).into_iter().chain(deadline).min()
            }
        };
        self.wait(timeout);
    }

    /// Until the VMM, a command or the urgent lane has something, or the time is over, if there is one.
    fn wait(&mut self, timeout: Option<Duration>) {
        let listens = !self.stopped && !self.uffds.is_empty();
        let wait = |fd: RawFd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut all = vec![wait(self.doorbell.as_raw_fd())];
        all.extend(self.uffds.iter().map(|uffd| wait(uffd.as_raw_fd())));
        all.extend(self.urgent.iter().filter(|_| listens).map(|lane| wait(lane.as_raw_fd())));
        let spec = timeout.map(|timeout| libc::timespec {
            tv_sec: timeout.as_secs() as libc::time_t,
            tv_nsec: libc::c_long::from(timeout.subsec_nanos() as i32),
        });
        let spec = spec.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: as many pollfds as said; a time, or none; no signal mask.
        unsafe { libc::ppoll(all.as_mut_ptr(), all.len() as libc::nfds_t, spec, std::ptr::null()) };
        if all[0].revents != 0 {
            self.doorbell.answer();
        }
        let (uffds, lane) = all[1..].split_at(self.uffds.len());
        self.uffds_have = uffds.iter().any(|uffd| uffd.revents != 0);
        self.urgent_has |= lane.iter().any(|lane| lane.revents != 0);
    }

    fn check_timers(&mut self) {
        if self.link != LinkState::Up {
            return;
        }
        let now = Instant::now();
        if self.bulk.is_due(now) {
            self.open_bulk();
        }
        if now < self.check {
            return;
        }
        self.check = now + DEADLINE_CHECK;
        self.ask_unasked();
        let Some(timeout) = self.source.as_ref().map(|s| s.source.demand_timeout).filter(|_| !self.stopped) else {
            return;
        };
        let late = self.shared.lock().waiting().find(|(_, w)| w.asked.is_some_and(|asked| asked.elapsed() > timeout));
        if let Some((page, _)) = late {
            let gpa = self.shared.lock().numbering().region_of(page).map_or(0, |r| r.gpa_of(page).0);
            self.link_down(format!("no answer for the page at {gpa:#x} in {timeout:?}"));
        }
    }

    // ---- commands ----

    fn handle_command(&mut self, command: Command) {
        match command {
            Command::Attach(memory, notifier, answer) => {
                let _ = answer.send(self.attach(memory, notifier));
            }
            Command::HangUp => self.shared.lock().hang_up(),
            Command::MayConnect(source, answer) => {
                let same = self.urgent.is_some() && self.source.as_ref().is_some_and(|s| s.source == source);
                let _ = answer.send(match self.uffds.is_empty() {
                    _ if self.link == LinkState::Done || same => Ok(false),
                    true => Err(Status::failed_precondition("the VMM has not attached its memory")),
                    false if self.allocating => Err(Status::failed_precondition("memory is being allocated")),
                    false => Ok(true),
                });
            }
            Command::Connected(source, stream, answer) => {
                self.link_up(source, stream);
                let _ = answer.send(());
            }
            Command::StartPush(lanes, answer) => {
                let _ = answer.send(self.start_push(lanes));
            }
            Command::BulkOpened(generation, opened) => {
                if let Err(status) = self.bulk.opened(generation, opened) {
                    self.bulk_lost(&format!("{:?}: {}", status.code(), status.message()));
                }
            }
            Command::BulkReport(generation, report) => self.bulk_reported(generation, report),
            Command::Complete(answer) => {
                let _ = answer.send(self.complete());
            }
            Command::MarkPoisoned(errors, answer) => {
                let _ = answer.send(self.shared.with_no_install_in_flight(|resolver| resolver.mark_poisoned(&errors)));
            }
            Command::Allocate(answer) => {
                let targets = self.targets();
                self.allocating = targets.is_ok();
                if let Err(Ok(_)) = answer.send(targets) {
                    self.allocating = false;
                }
            }
            Command::Allocated(receive_mappings) => {
                self.allocating = false;
                self.shared.lock().set_receive_mappings(receive_mappings);
            }
            Command::Snapshot(answer) => {
                let (link, link_reason) = (self.link, self.link_reason.clone());
                let _ = answer.send(Snapshot { link, link_reason, progress: self.shared.lock().progress() });
            }
            Command::End(_) => {}
        }
    }

    fn attach(&mut self, memory: AttachedMemory, notifier: Option<VmmNotifier>) -> Result<(), String> {
        let uffds: Result<Vec<_>, _> =
            memory.uffds.into_iter().map(|fd| Userfaultfd::adopt(fd).map(Arc::new)).collect();
        let uffds = uffds.map_err(|e| format!("uffd: {e}"))?;
        let backing = |AttachedRegion { hva, file, uffd }| {
            let uffd = uffd.and_then(|number| uffds.get(number)).ok_or("uffd: a destination's region needs one")?;
            Ok::<_, String>((hva, RegionBacking { uffd: uffd.clone(), file }))
        };
        let footed: Vec<_> = memory.regions.into_iter().map(backing).collect::<Result<_, _>>()?;
        let (hvas, backings) = footed.into_iter().unzip();
        let address_map =
            AddressMap::new(self.shared.lock().numbering().clone(), hvas).ok_or("regions: another number")?;
        let started = process_started(memory.vmm_pid);
        let fresh = self.shared.lock().table().is_fresh();
        let installer = Installer::new(address_map, backings, memory.vmm_pid, fresh)
            .map_err(|e| format!("regions: faults on what the file holds cannot be told of, as they were: {e}"))?;
        let small = |r: &NumberedRegion| r.region.page_size == PAGE_SIZE;
        let regions = installer.address_map().ranges().zip(installer.address_map().numbering().regions());
        let ranges = regions.filter(|(_, region)| small(region)).map(|(range, _)| range).collect();
        self.to_collapse = memory.collapse.then_some((memory.vmm_pid, ranges));
        self.shared.with_no_install_in_flight(|pages| pages.attach(memory.vmm_pid, started, installer, notifier))?;
        self.uffds = uffds;
        Ok(())
    }

    fn link_up(&mut self, source: SourceConnection, stream: std::net::TcpStream) {
        self.drop_lanes();
        self.urgent = Some(LaneReceiver::new(stream, LaneKind::Urgent));
        self.source = Some(source);
        self.set_link(LinkState::Up, String::new());
        self.ask_unasked();
        self.bulk.failures = 0;
        self.open_bulk();
    }

    fn start_push(&mut self, lanes: usize) -> Result<(), Status> {
        if self.link == LinkState::Done {
            return Ok(());
        }
        if self.urgent.is_none() {
            return Err(Status::failed_precondition(format!("lanes are not connected: {}", self.link_reason)));
        }
        self.bulk.wanted = lanes;
        if self.bulk.is_closed() {
            self.open_bulk();
        }
        Ok(())
    }

    fn complete(&mut self) -> Result<u64, Status> {
        let missing = self.shared.lock().table().counts().missing();
        if missing > 0 {
            return Err(Status::failed_precondition(format!("{missing} pages are still absent")));
        }
        let guarded = self.shared.lock().complete().map_err(Status::internal)?;
        if let Some((pid, ranges)) = self.to_collapse.take() {
            let _ = std::thread::Builder::new().name("collapse".into()).spawn(move || collapse_all(pid, &ranges));
        }
        Ok(guarded)
    }

    /// Where zeros may be written: nothing has come, and nothing can come meanwhile.
    fn targets(&self) -> Result<Vec<Option<PreallocateTarget>>, Status> {
        if self.allocating || self.link != LinkState::Idle || !self.shared.lock().table().is_fresh() {
            return Err(Status::failed_precondition("memory is allocated once, before lanes are connected"));
        }
        let resolver = self.shared.lock();
        let memory =
            resolver.memory().ok_or_else(|| Status::failed_precondition("the VMM has not attached its memory"))?;
        memory.targets(resolver.table().bound_to()).map_err(|e| Status::resource_exhausted(format!("descriptor: {e}")))
    }

    // ---- the link ----

    fn set_link(&mut self, state: LinkState, reason: String) {
        tracing::info!(state = state.as_str_name(), reason, "pager.link");
        self.link = state;
        self.link_reason.clone_from(&reason);
        self.events.append(PagerEvent::Link(LinkEvent { state: state.into(), reason }));
    }

    fn link_down(&mut self, reason: String) {
        self.drop_lanes();
        if self.link == LinkState::Up {
            self.set_link(LinkState::Down, reason);
        }
    }

    /// What was asked for, or has come in part, is absent again.
    fn drop_lanes(&mut self) {
        self.urgent = None;
        self.urgent_has = false;
        self.bulk.close();
        self.shared.lock().release_requests();
    }

    /// After everything that may have brought the last page.
    fn finish_if_complete(&mut self) {
        if self.link == LinkState::Done || self.shared.lock().table().counts().missing() > 0 {
            return;
        }
        self.drop_lanes();
        self.bulk.wanted = 0;
        let receive_mappings = self.shared.lock().take_receive_mappings();
        // To unmap them takes long, and a poisoned page may be touched any time.
        let _ = std::thread::Builder::new().name("unmap".into()).spawn(move || drop(receive_mappings));
        self.set_link(LinkState::Done, String::new());
        self.events.append(PagerEvent::AllPresent(AllPresentEvent {}));
    }

    fn ask(&mut self, page: PageIndex) {
        let Some(lane) = &self.urgent else { return };
        let ask = self.shared.lock().ask(page);
        let Some(ask) = ask else { return };
        if let Err(error) = send(lane, ask) {
            self.link_down(format!("urgent lane: {error}"));
        }
    }

    fn ask_unasked(&mut self) {
        let unasked = self.shared.lock().unasked();
        unasked.into_iter().for_each(|page| self.ask(page));
    }

    /// Whether anything was there.
    fn take_urgent(&mut self) -> bool {
        let Some(lane) = self.urgent.as_mut().filter(|_| self.urgent_has && !self.uffds.is_empty()) else {
            return false;
        };
        let step = lane.step(&self.shared);
        self.urgent_has = match step {
            Step::Nothing => false,
            Step::Progress => lane.has_more(),
            _ => true,
        };
        match step {
            Step::Nothing => false,
            Step::Progress => true,
            Step::Stopped(stop) => {
                self.stopped = true;
                self.cannot_install(stop);
                false
            }
            Step::Ended => {
                self.link_down("the source closed the urgent lane".into());
                true
            }
            Step::Broken { reason, .. } => {
                self.link_down(format!("urgent lane: {reason}"));
                true
            }
        }
    }

    // ---- push ----

    /// Asks for all that is absent, if push is wanted and there is a link.
    fn open_bulk(&mut self) {
        if let Some(source) = self.source.as_ref().filter(|_| self.urgent.is_some()) {
            let lacking = self.shared.lock().lacking();
            self.bulk.open(source, lacking);
        }
    }

    fn bulk_reported(&mut self, generation: u64, report: LaneReport) {
        match self.bulk.reported(generation, report) {
            None | Some(Step::Nothing | Step::Progress | Step::Ended) => {}
            Some(Step::Stopped(stop)) => self.cannot_install(stop),
            Some(Step::Broken { reason, nonsense: true }) => self.link_down(format!("bulk lane: {reason}")),
            Some(Step::Broken { reason, nonsense: false }) => self.bulk_lost(&reason),
        }
    }

    fn bulk_lost(&mut self, reason: &str) {
        tracing::warn!(reason, failures = self.bulk.failures, "pager.bulk_lane_lost");
        if self.bulk.failed_for_good() {
            self.link_down(format!("bulk lane: {reason}"));
        }
    }

    /// A frame cannot be installed now.
    fn cannot_install(&mut self, stop: Stop) {
        match stop {
            Stop::Changing | Stop::NoMemory | Stop::AlreadyPresent => {}
            Stop::ProcessGone => self.memory_gone(),
            Stop::NotRegistered => self.fail("memory of the VMM is not registered".into()),
            Stop::Refused(errno) => {
                let error = std::io::Error::from_raw_os_error(errno);
                self.fail(format!("a page cannot be installed: {error}"));
            }
        }
    }

    fn memory_gone(&mut self) {
        self.uffds.clear();
        self.bulk.close();
        self.bulk.wanted = 0;
        self.shared.lock().drop_memory();
        self.fail("the VMM's address space is gone".into());
    }

    /// Says once why pages cannot arrive; goes on serving what it can.
    fn fail(&mut self, reason: String) {
        if self.failed.as_ref() != Some(&reason) {
            tracing::error!(reason, "pager.failed");
            self.failed = Some(reason.clone());
            self.events.append(PagerEvent::Failed(FailedEvent { reason }));
        }
    }

    // ---- the VMM's events ----

    /// Whether there was any.
    fn drain_uffds(&mut self) -> bool {
        if !std::mem::take(&mut self.uffds_have) {
            return false;
        }
        let mut any = false;
        for number in 0..self.uffds.len() {
            any |= self.drain_uffd(number);
        }
        any
    }

    fn drain_uffd(&mut self, number: usize) -> bool {
        let mut any = false;
        loop {
            let Some(uffd) = self.uffds.get(number) else { return any };
            match uffd.read_events() {
                Ok(events) if events.is_empty() => return any,
                Ok(events) => {
                    let last = events.len() < MAX_EVENTS_A_READ;
                    events.into_iter().for_each(|event| self.vmm_event(event));
                    if last {
                        return true;
                    }
                }
                Err(error) => {
                    self.uffds.clear();
                    self.fail(format!("the VMM's userfaultfd cannot be read: {error}"));
                }
            }
            any = true;
        }
    }

    fn vmm_event(&mut self, event: UffdEvent) {
        match event {
            UffdEvent::Fault { at, thread, minor } => self.fault(at, thread, minor),
            UffdEvent::Remove { start, end } | UffdEvent::Unmap { start, end } => {
                self.shared.with_no_install_in_flight(|resolver| resolver.discard(start, end));
            }
            UffdEvent::Remap { from, to, size } => {
                self.fail(format!("the VMM moved its memory: {:#x}+{size:#x} to {:#x}", from.0, to.0));
            }
            UffdEvent::Fork(fd) if fd >= 0 => {
                // SAFETY: the kernel made the descriptor for the reader of the event, which is us.
                self.forked.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
            UffdEvent::Fork(_) | UffdEvent::Unknown(_) => tracing::warn!(?event, "pager.unknown_event"),
        }
    }

    fn fault(&mut self, at: Hva, thread: u32, minor: bool) {
        self.shared.note_fault(thread);
        let outcome = self.shared.lock().fault(at, thread, minor);
        match outcome {
            FaultOutcome::Ask(page) => {
                self.ask(page);
                self.cpu_latency.renew();
            }
            FaultOutcome::Waits | FaultOutcome::Resolved => {}
            FaultOutcome::Again(Stop::ProcessGone) => self.memory_gone(),
            FaultOutcome::Again(stop) => tracing::debug!(?stop, at = at.0, "pager.fault_again"),
            FaultOutcome::Outside => self.fail(format!("a thread waits at {:#x}, outside the layout", at.0)),
        }
    }
}

/// Asks on the urgent lane. A source that takes no asks, thousands of them unread, is as good as gone.
fn send(lane: &LaneReceiver, ask: Ask) -> std::io::Result<()> {
    lane.stream().write_all(&ask.encode())
}
