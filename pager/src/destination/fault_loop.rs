//! The page path of a destination: one thread, one loop.
//!
//! ```text
//!  uffd events ──▶ request on the urgent lane ──▶ frame ──▶ install, which wakes the vCPU
//! ```
//!
//! Order of attention: the urgent lane, uffd events, commands. Bulk lanes have threads of their own
//! ([`crate::destination::lanes::bulk_lane`]). After each step the thread yields its CPU. Where a look finds nothing it spins for
//! a moment, yielding too, then sleeps in poll(2). During a heavy push it is real-time, so it does neither, and looks only where
//! poll(2) reports something.

use std::iter::once;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};

use crate::destination::command::{Command, Snapshot};
use crate::destination::error::{AttachError, CompleteError, LinkError};
use crate::destination::lanes::receiver::INSTALL_RETRY_DELAY;
use crate::destination::link::{Link, Received, Trouble};
use crate::destination::memory::collapse::collapse_all;
use crate::destination::memory::installer::{Installer, RegionBacking};
use crate::destination::memory::preallocate::{PreallocateError, PreallocateTarget};
use crate::destination::pages::resolver::given_back::HOLD_CHECK;
use crate::destination::pages::resolver::{FaultOutcome, Resolver};
use crate::destination::pages::shared_pages::SharedPages;
use crate::event_log::EventLog;
use crate::lane::connect::SourceAddress;
use crate::layout::address_map::{AddressMap, NumberedRegion};
use crate::layout::{Hva, PAGE_SIZE};
use crate::proto::pager_event::Event;
use crate::proto::{FailedEvent, LinkState};
use crate::sched::cpu_latency::CpuLatencyRequest;
use crate::sched::fault_thread::FaultThread;
use crate::sys::doorbell::Doorbell;
use crate::sys::poll::wait_readable;
use crate::sys::procfs::process_started;
use crate::sys::userfaultfd::{MAX_EVENTS_A_READ, Stop, UffdEvent, Userfaultfd};
use crate::vmm::attached_memory::{AttachedMemory, AttachedRegion};
use crate::vmm::notifier::VmmNotifier;

/// The loop and all that it owns.
pub struct FaultLoop {
    shared: Arc<SharedPages>,
    events: EventLog,
    commands: Receiver<Command>,
    /// Rings when there is a command.
    doorbell: Arc<Doorbell>,
    link: Link,
    thread: FaultThread,
    cpu_latency: CpuLatencyRequest,
    /// Those of the VMM's memory; empty while none is attached.
    uffds: Vec<Arc<Userfaultfd>>,
    /// Whether one of them may have events.
    uffds_readable: bool,
    /// A frame waits for events to be read, or for memory.
    stopped: bool,
    /// Userfaultfds of forked children. They are held open: else a page that the child has not touched would read as zeros.
    forked: Vec<OwnedFd>,
    /// The failure that was reported last.
    failed: Option<String>,
    /// Process and ranges to be made of huge pages after the end, where the VMM asked for it.
    to_collapse: Option<(u32, Vec<(Hva, u64)>)>,
    /// `Preallocate` writes to the VMM's files.
    allocating: bool,
    /// Threads wait at poison of which the VMM has dropped the marker.
    holding: bool,
}

impl FaultLoop {
    /// Nothing is attached or connected.
    pub fn new(
        shared: Arc<SharedPages>,
        events: EventLog,
        (commands, doorbell): (Receiver<Command>, Arc<Doorbell>),
        link: Link,
        thread: FaultThread,
        keep_awake: bool,
    ) -> Self {
        Self {
            shared,
            events,
            commands,
            doorbell,
            link,
            thread,
            cpu_latency: CpuLatencyRequest::new(keep_awake),
            uffds: Vec::new(),
            uffds_readable: true,
            stopped: false,
            forked: Vec::new(),
            failed: None,
            to_collapse: None,
            allocating: false,
            holding: false,
        }
    }

    /// Runs until [`Command::End`], or until nobody can send commands.
    pub fn run(mut self) {
        loop {
            self.stopped = false;
            let received = self.receive_urgent();
            if received {
                self.thread.yield_cpu();
            }
            let mut busy = self.read_uffds();
            loop {
                match self.commands.try_recv() {
                    Ok(Command::End(answer)) => return self.end(answer),
                    Ok(command) => self.handle_command(command),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
                busy = true;
            }
            self.holding = self.holding && self.shared.lock().end_holds();
            self.link.finish_if_complete();
            if let Some(heavy) = self.thread.update_class(self.link.push_work()) {
                self.shared.set_heavy(heavy);
            }
            self.link.check_timers(self.stopped);
            self.events.wake_watchers();
            if received || busy {
                self.thread.found_work();
                if busy {
                    self.thread.yield_cpu();
                }
                if !self.thread.is_realtime() || self.link.is_readable() {
                    self.recheck_all();
                    continue;
                }
            } else if self.thread.should_spin(self.link.awaits_reply()) {
                self.thread.yield_cpu();
                self.recheck_all();
                continue;
            }
            self.sleep();
        }
    }

    fn end(&self, answer: tokio::sync::oneshot::Sender<()>) {
        self.events.wake_watchers();
        let removed = self.shared.lock().table().remove();
        if let Err(error) = removed {
            tracing::warn!(%error, "pager.page_table_kept");
        }
        let _ = answer.send(());
    }

    /// The next round looks everywhere without having slept: at the urgent lane only where a reply is due. The next sleep finds
    /// that a lane ends, or that its source reports a failure.
    fn recheck_all(&mut self) {
        self.uffds_readable = true;
        if self.link.awaits_reply() {
            self.link.note_readable();
        }
    }

    /// Sleeps until the VMM, a command or the urgent lane has something, or a timer is due.
    fn sleep(&mut self) {
        let timer = if self.stopped { Some(INSTALL_RETRY_DELAY) } else { self.link.next_timer() };
        let timeout = timer.into_iter().chain(self.holding.then_some(HOLD_CHECK)).min();
        let urgent = self.link.urgent_fd().filter(|_| !self.stopped && !self.uffds.is_empty());
        let uffds = self.uffds.iter().map(|uffd| uffd.as_fd());
        let ready = wait_readable(once(self.doorbell.as_fd()).chain(uffds).chain(urgent), timeout);
        let first_lane = 1 + self.uffds.len();
        let (commands, uffds) = (ready.any(0..1), ready.any(1..first_lane));
        let urgent = ready.any(first_lane..ready.count());
        if commands {
            self.doorbell.answer();
        }
        self.uffds_readable = uffds;
        if urgent {
            self.link.note_readable();
        }
    }

    /// Whether a frame, or a part of one, came.
    fn receive_urgent(&mut self) -> bool {
        if self.uffds.is_empty() {
            return false;
        }
        match self.link.receive_urgent() {
            Received::Nothing => false,
            Received::Progress => true,
            Received::Stopped(stop) => {
                self.stopped = true;
                self.cannot_install(stop);
                false
            }
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
                let _ = answer.send(self.may_connect(&source));
            }
            Command::Connected(source, stream, answer) => {
                self.link.connected(source, stream);
                let _ = answer.send(());
            }
            Command::StartPush(lanes, answer) => {
                let _ = answer.send(self.link.start_push(lanes));
            }
            Command::Bulk(event) => match self.link.bulk_event(event) {
                Some(Trouble::Stopped(stop)) => self.cannot_install(stop),
                Some(Trouble::PushFails(reason)) => self.fail(reason),
                None => {}
            },
            Command::Redialled(result) => self.link.redialled(result),
            Command::Complete(answer) => {
                let _ = answer.send(self.complete());
            }
            Command::MarkPoisoned(errors, answer) => {
                let mark = |resolver: &mut Resolver| resolver.mark_poisoned(&errors);
                let _ = answer.send(self.shared.with_no_install_in_flight(mark));
            }
            Command::ForgetReplaced(answer) => {
                let _ = answer.send(self.shared.with_no_install_in_flight(Resolver::forget_replaced));
            }
            Command::Allocate(answer) => {
                let targets = self.preallocate_targets();
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
                let (link, reason) = self.link.state();
                let progress = self.shared.lock().progress();
                let _ = answer.send(Snapshot { link, link_reason: reason.to_owned(), progress });
            }
            Command::End(_) => {}
        }
    }

    fn attach(&mut self, memory: AttachedMemory, notifier: Option<VmmNotifier>) -> Result<(), AttachError> {
        let adopt = |fd| Userfaultfd::adopt(fd).map(Arc::new).map_err(AttachError::Userfaultfd);
        let uffds = memory.uffds.into_iter().map(adopt).collect::<Result<Vec<_>, _>>()?;
        let backing = |AttachedRegion { hva, file, uffd }| {
            let uffd = uffd.and_then(|number| uffds.get(number)).ok_or(AttachError::RegionWithoutUserfaultfd)?;
            Ok::<_, AttachError>((hva, RegionBacking { uffd: uffd.clone(), file }))
        };
        let backed: Vec<_> = memory.regions.into_iter().map(backing).collect::<Result<_, _>>()?;
        let (hvas, backings) = backed.into_iter().unzip();
        let address_map =
            AddressMap::new(self.shared.lock().numbering().clone(), hvas).ok_or(AttachError::RegionCount)?;
        let started = process_started(memory.vmm_pid);
        let fresh = self.shared.lock().table().is_fresh();
        let installer =
            Installer::new(address_map, backings, memory.vmm_pid, fresh).map_err(AttachError::MinorFaults)?;
        let small = |r: &NumberedRegion| r.region.page_size == PAGE_SIZE;
        let regions = installer.address_map().ranges().zip(installer.address_map().numbering().regions());
        let ranges = regions.filter(|(_, region)| small(region)).map(|(range, _)| range).collect();
        self.to_collapse = memory.collapse.then_some((memory.vmm_pid, ranges));
        self.shared.with_no_install_in_flight(|pages| pages.attach(memory.vmm_pid, started, installer, notifier))?;
        self.uffds = uffds;
        Ok(())
    }

    fn may_connect(&self, source: &SourceAddress) -> Result<bool, LinkError> {
        match self.uffds.is_empty() {
            _ if self.link.needs_no_connection(source) => Ok(false),
            true => Err(LinkError::NotAttached),
            false if self.allocating => Err(LinkError::Allocating),
            false => Ok(true),
        }
    }

    fn complete(&mut self) -> Result<u64, CompleteError> {
        let guarded = self.shared.lock().complete()?;
        if let Some((pid, ranges)) = self.to_collapse.take() {
            let _ = std::thread::Builder::new().name("collapse".into()).spawn(move || collapse_all(pid, &ranges));
        }
        Ok(guarded)
    }

    /// The memory into which zeros may be written: no page has come, and none can come before [`Command::Allocated`].
    fn preallocate_targets(&self) -> Result<Vec<Option<PreallocateTarget>>, PreallocateError> {
        let idle = self.link.state().0 == LinkState::Idle;
        let resolver = self.shared.lock();
        if self.allocating || !idle || !resolver.table().is_fresh() {
            return Err(PreallocateError::TooLate);
        }
        let memory = resolver.memory().ok_or(PreallocateError::NotAttached)?;
        memory.targets(resolver.table().bound_to()).map_err(PreallocateError::Descriptor)
    }

    // ---- failures ----

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
        self.link.stop_push();
        self.shared.lock().drop_memory();
        self.fail("the VMM's address space is gone".into());
    }

    /// Reports once why pages cannot arrive; the thread goes on serving what it can.
    fn fail(&mut self, reason: String) {
        if self.failed.as_ref() != Some(&reason) {
            tracing::error!(reason, "pager.failed");
            self.failed = Some(reason.clone());
            self.events.append(Event::Failed(FailedEvent { reason }));
        }
    }

    // ---- the VMM's events ----

    /// Whether there was any.
    fn read_uffds(&mut self) -> bool {
        if !std::mem::take(&mut self.uffds_readable) {
            return false;
        }
        let mut any = false;
        for number in 0..self.uffds.len() {
            any |= self.read_uffd(number);
        }
        any
    }

    fn read_uffd(&mut self, number: usize) -> bool {
        let mut any = false;
        loop {
            let Some(uffd) = self.uffds.get(number) else { return any };
            // Once a REMOVE is read, the guest's madvise goes on: a frame on its way would fill the page after all.
            let read = self.shared.with_no_install_in_flight(|resolver| {
                uffd.read_events().inspect(|events| {
                    for event in events {
                        if let UffdEvent::Remove { start, end } | UffdEvent::Unmap { start, end } = *event {
                            resolver.discard(start, end);
                        }
                    }
                })
            });
            match read {
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
            // Discarded when it was read.
            UffdEvent::Remove { .. } | UffdEvent::Unmap { .. } => {}
            UffdEvent::Remap { from, to, size } => {
                self.fail(format!("the VMM moved its memory: {:#x}+{size:#x} to {:#x}", from.0, to.0));
            }
            UffdEvent::Fork(child) => self.forked.push(child.into()),
            UffdEvent::Unknown(_) => tracing::warn!(?event, "pager.unknown_event"),
        }
    }

    fn fault(&mut self, at: Hva, thread: u32, minor: bool) {
        self.shared.note_fault(thread);
        let outcome = self.shared.lock().fault(at, thread, minor);
        match outcome {
            FaultOutcome::Ask(page) => {
                self.link.request(page);
                self.cpu_latency.renew();
            }
            FaultOutcome::Held => self.holding = true,
            FaultOutcome::Waits | FaultOutcome::Resolved => {}
            FaultOutcome::Again(Stop::ProcessGone) => self.memory_gone(),
            FaultOutcome::Again(stop) => tracing::debug!(?stop, at = at.0, "pager.fault_again"),
            FaultOutcome::Outside => self.fail(format!("a thread waits at {:#x}, outside the layout", at.0)),
        }
    }
}
