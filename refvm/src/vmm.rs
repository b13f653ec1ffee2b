//! The VMM's control loop: the one owner of the VM's state. It never touches guest memory and never blocks on anything
//! that waits for a page. A thread that does sends it an [`Event`] at the end.
//!
//! ```text
//!  control thread ──frames──▶ ┌──────────────┐ ──jobs──▶ machine thread ──▶ vCPU threads
//!  admin threads ──commands─▶ │ control loop │ ◀──done──      │ machine checks
//!  pager link ────poison────▶ └──────────────┘ ◀──────────────┘
//! ```
//! Requests are carried out one after the other; a request that comes during another waits.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::admin::{AdminCommand, AdminEvent};
use crate::control::{ControlEvent, ControlLink};
use crate::guest::FIRST_EPOCH;
use crate::guest::mapped::gpa_of;
use crate::inject::{self, Means};
use crate::layout::Backing;
use crate::machine::{Block, GuestConfig, GuestMemoryError, KERNEL_BYTES, MachineError};
use crate::machine_thread::{Commanded, MachineThread};
use crate::memory::{GuestMemory, Region};
use crate::memory_errors::Untold;
use crate::operation::{self, Done, Ended, Failure, Guest};
use crate::options::{Options, TestFaults};
use crate::protocol::frame::TooLong;
use crate::protocol::message::{self, BadMessage, FromDaemon, Poisoned, Request, VERSION};
use crate::protocol::state::{Decision, Verb, VmState, decide};

/// Something that happened.
#[derive(Debug)]
pub enum Event {
    /// On the control connection.
    Control(ControlEvent),
    /// On the admin socket.
    Admin(AdminEvent),
    /// The guest was given a machine check.
    GuestError(GuestMemoryError),
    /// On the memory connection.
    Poisoned(Poisoned),
    /// A memory error was made, and the daemon must hear of it.
    Tell(Block),
    /// The host found a bad frame that no thread has touched.
    FoundEarly {
        /// Where it is mapped here.
        hva: u64,
    },
    /// The request under way has ended.
    Done(Ended),
}

impl From<ControlEvent> for Event {
    fn from(event: ControlEvent) -> Self {
        Self::Control(event)
    }
}

impl From<AdminEvent> for Event {
    fn from(event: AdminEvent) -> Self {
        Self::Admin(event)
    }
}

impl From<Poisoned> for Event {
    fn from(poisoned: Poisoned) -> Self {
        Self::Poisoned(poisoned)
    }
}

impl From<Ended> for Event {
    fn from(ended: Ended) -> Self {
        Self::Done(ended)
    }
}

/// The next step of the loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    Continue,
    Exit(u8),
}

/// A request and its sender.
#[derive(Debug)]
struct Asked {
    connection: u64,
    id: u64,
    request: Request,
}

/// The VM as the protocol sees it.
pub struct Vmm {
    options: Options,
    events: Sender<Event>,
    errors: Sender<GuestMemoryError>,
    control: Option<ControlLink>,
    welcomed: bool,
    state: VmState,
    guest: Option<Guest>,
    under_way: Option<Asked>,
    queue: VecDeque<Asked>,
    untold: Untold,
    faults: TestFaults,
    stopped_us: u64,
    started_us: u64,
}

fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

impl Vmm {
    /// A VM that waits to be a destination.
    pub fn incoming(options: Options, events: Sender<Event>, errors: Sender<GuestMemoryError>) -> Self {
        let faults = options.faults.clone();
        Self {
            options,
            events,
            errors,
            control: None,
            welcomed: false,
            state: VmState::Incoming,
            guest: None,
            under_way: None,
            queue: VecDeque::new(),
            untold: Untold::default(),
            faults,
            stopped_us: 0,
            started_us: 0,
        }
    }

    /// Boots a guest here.
    ///
    /// # Errors
    /// [`Failure`] with the host's shortage.
    pub fn boot(&mut self, memory: GuestMemory, config: GuestConfig) -> Result<(), Failure> {
        let memory = Arc::new(memory);
        let make = self.options.accel.make();
        let machine = MachineThread::spawn(make, Arc::clone(&memory), config, self.errors.clone())?;
        let (ended, end) = std::sync::mpsc::channel();
        machine.command(move |commanded: &mut Commanded| {
            let booted = commanded.machine().boot().and_then(|()| commanded.run());
            drop(ended.send(booted));
        });
        end.recv().map_err(|_| Failure::failed("the machine thread ended while the guest booted"))??;
        self.guest = Some(Guest {
            memory,
            machine,
            vcpus: config.vcpus,
            epoch: Some(FIRST_EPOCH),
            uffds: Vec::new(),
            link: None,
            prepared_as: None,
        });
        self.state = VmState::Running;
        self.started_us = now_us();
        tracing::info!(vm = self.options.vm, "vmm.booted");
        Ok(())
    }

    /// Runs until the VM has moved away or is told to quit; returns the exit code.
    pub fn run(mut self, inbox: &Receiver<Event>) -> u8 {
        while let Ok(event) = inbox.recv() {
            if let Flow::Exit(code) = self.on_event(event) {
                return code;
            }
        }
        0
    }

    fn on_event(&mut self, event: Event) -> Flow {
        match event {
            Event::Control(event) => return self.on_control(event),
            Event::Admin(AdminEvent { command, reply }) => return self.on_admin(command, &reply),
            Event::GuestError(error) => {
                let severity = if error.action_required { "AR" } else { "AO" };
                let Block { gpa, lsb } = error.block;
                self.tell(json!({"gpa": gpa, "lsb": lsb, "severity": severity, "guest_visible": true,
                                 "thread": error.thread}));
            }
            Event::Tell(Block { gpa, lsb }) => {
                self.tell(json!({"gpa": gpa, "lsb": lsb, "severity": null, "guest_visible": false, "thread": 0}));
            }
            Event::FoundEarly { hva } => self.on_found_early(hva),
            Event::Poisoned(Poisoned { block, waits }) => self.on_poisoned(block, waits),
            Event::Done(result) => return self.on_done(*result),
        }
        Flow::Continue
    }

    fn on_control(&mut self, event: ControlEvent) -> Flow {
        match event {
            ControlEvent::Connected(link) => {
                self.control = Some(link);
                self.welcomed = false;
                self.send(&self.hello());
            }
            ControlEvent::Frame(connection, frame) if self.is_current(connection) => {
                return self.on_frame(connection, frame);
            }
            ControlEvent::Lost(connection) if self.is_current(connection) => {
                tracing::info!("control.lost");
                self.control = None;
                self.queue.clear();
            }
            ControlEvent::Frame(..) | ControlEvent::Lost(_) => {}
        }
        Flow::Continue
    }

    fn is_current(&self, connection: u64) -> bool {
        self.control.as_ref().is_some_and(|link| link.connection == connection)
    }

    fn hello(&self) -> Value {
        let guest = self.guest.as_ref().filter(|_| self.state != VmState::Incoming);
        let regions: Vec<_> =
            guest.map_or_else(Vec::new, |guest| guest.memory.regions().iter().map(describe).collect());
        let mut hello = json!({"type": "hello", "version": VERSION, "vm": self.options.vm, "pid": std::process::id(),
               "platform": self.options.accel.platform(), "vcpus": guest.map_or(0, |guest| guest.vcpus),
               "regions": regions, "abilities": ["source", "destination", "memory_errors"],
               "state": self.state.name()});
        if self.options.incoming && self.options.memory_of.is_own() {
            hello["memory"] = json!(self.options.memory_of);
        }
        hello
    }

    fn on_frame(&mut self, connection: u64, frame: Result<Vec<u8>, TooLong>) -> Flow {
        let unreadable = |error: TooLong| BadMessage { id: None, field: String::new(), message: error.to_string() };
        match frame.map_err(unreadable).and_then(|frame| FromDaemon::parse(&frame)) {
            Ok(FromDaemon::Welcome) => {
                self.welcomed = true;
                self.untold.waiting().cloned().collect::<Vec<_>>().iter().for_each(|message| self.send(message));
            }
            Ok(FromDaemon::Recorded(seq)) => self.untold.recorded(seq),
            Ok(FromDaemon::Refused(reason)) => tracing::warn!(reason, "control.refused"),
            Ok(FromDaemon::Request(id, request)) if self.welcomed => return self.on_request(connection, id, request),
            Ok(FromDaemon::Request(id, _)) => self.refuse_message(&BadMessage {
                id: Some(id),
                field: "type".into(),
                message: "a request before welcome".into(),
            }),
            Err(bad) => self.refuse_message(&bad),
        }
        Flow::Continue
    }

    /// A request with an id is answered and the connection stays; after anything else it is closed.
    fn refuse_message(&mut self, bad: &BadMessage) {
        tracing::warn!(field = bad.field, reason = bad.message, "control.bad_message");
        self.send(&message::error(bad.id, "BAD_MESSAGE", &bad.field, &bad.message));
        if let (None, Some(link)) = (bad.id, &self.control) {
            link.close();
        }
    }

    fn on_request(&mut self, connection: u64, id: u64, request: Request) -> Flow {
        let verb = request.verb();
        tracing::info!(request = verb.name(), id, state = self.state.name(), "control.request");
        if self.faults.dies_at(verb) {
            return Flow::Exit(3);
        }
        if self.faults.stalls_at(verb) {
            return Flow::Continue;
        }
        if self.faults.fails_at(verb) {
            let message = format!("{} fails once, as --fail-at asks", verb.name());
            self.send(&message::error(Some(id), "FAILED", "", &message));
            return Flow::Continue;
        }
        self.queue.push_back(Asked { connection, id, request });
        self.next_request()
    }

    fn next_request(&mut self) -> Flow {
        while self.under_way.is_none() {
            let Some(asked) = self.queue.pop_front() else { break };
            match decide(self.state, asked.request.verb()) {
                Decision::Refuse(text) => self.answer(&asked, Err(Failure::new("BAD_STATE", "type", text))),
                Decision::Done => {
                    let answer = self.done_before(&asked.request);
                    self.answer(&asked, answer);
                }
                Decision::Do => {
                    if let Flow::Exit(code) = self.begin(asked) {
                        return Flow::Exit(code);
                    }
                }
            }
        }
        Flow::Continue
    }

    /// The answer to a request with its end state reached.
    fn done_before(&self, request: &Request) -> Result<Value, Failure> {
        match request {
            Request::Stop => Ok(json!({"stopped_us": self.stopped_us})),
            Request::Start => Ok(json!({"started_us": self.started_us})),
            Request::Prepare(asked) => match self.guest.as_ref().and_then(|guest| guest.prepared_as.as_ref()) {
                Some(made) if made == asked => Ok(json!({})),
                _ => Err(Failure::new("BAD_STATE", "regions", "prepared for something else; reset it first".into())),
            },
            _ => Ok(json!({})),
        }
    }

    fn begin(&mut self, asked: Asked) -> Flow {
        let request = asked.request.clone();
        match (request, &mut self.guest) {
            (Request::Abandon, _) => {
                self.answer(&asked, Ok(json!({})));
                self.state = VmState::Gone;
                tracing::info!("vmm.abandoned");
                return Flow::Exit(0);
            }
            (Request::Prepare(prepare), None) => {
                self.under_way = Some(asked);
                let options = self.options.clone();
                let (events, errors) = (self.events.clone(), self.errors.clone());
                operation::in_thread(self.events.clone(), move || {
                    operation::prepare(&options, prepare, events, errors)
                });
            }
            (Request::AttachMemory { socket }, Some(guest)) => {
                if guest.link.as_ref().is_some_and(|link| link.is_attached_to(&socket)) {
                    self.answer(&asked, Ok(json!({})));
                    return Flow::Continue;
                }
                guest.link = None;
                let (vm, memory, events) = (self.options.vm.clone(), Arc::clone(&guest.memory), self.events.clone());
                self.under_way = Some(asked);
                operation::in_thread(self.events.clone(), move || operation::attach(&socket, &vm, &memory, events));
            }
            (Request::MigrationComplete { keep_uffd }, Some(guest)) => {
                if !keep_uffd {
                    guest.link = None;
                    guest.uffds.clear();
                }
                self.answer(&asked, Ok(json!({})));
            }
            (Request::Reset, guest) => {
                let guest = guest.take();
                self.under_way = Some(asked);
                operation::in_thread(self.events.clone(), move || {
                    drop(guest);
                    Ok(Done::default())
                });
            }
            (request, Some(guest)) => {
                operation::on_machine(&guest.machine, self.events.clone(), request);
                self.under_way = Some(asked);
            }
            (_, None) => self.answer(&asked, Err(Failure::failed("there is no guest"))),
        }
        Flow::Continue
    }

    fn on_done(&mut self, result: Result<Done, Failure>) -> Flow {
        let Some(asked) = self.under_way.take() else { return Flow::Continue };
        let verb = asked.request.verb();
        let answer = result.map(|done| {
            self.guest = done.guest.or(self.guest.take());
            if let Some(guest) = &mut self.guest {
                guest.link = done.link.or(guest.link.take());
                guest.epoch = done.epoch.or(guest.epoch);
            }
            self.state = verb.end_state().unwrap_or(self.state);
            match verb {
                Verb::Stop => self.stopped_us = now_us(),
                Verb::Start | Verb::Resume => self.started_us = now_us(),
                _ => {}
            }
            match verb {
                Verb::Stop => json!({"stopped_us": self.stopped_us}),
                Verb::Start => json!({"started_us": self.started_us}),
                _ => done.reply,
            }
        });
        self.answer(&asked, answer);
        self.next_request()
    }

    fn answer(&mut self, asked: &Asked, answer: Result<Value, Failure>) {
        let message = match answer {
            Ok(fields) => message::reply(asked.id, fields),
            Err(failure) => {
                let verb = asked.request.verb();
                tracing::warn!(
                    request = verb.name(),
                    code = failure.code,
                    reason = failure.message,
                    "control.refused_request"
                );
                message::error(Some(asked.id), failure.code, &failure.field, &failure.message)
            }
        };
        if self.is_current(asked.connection) {
            self.send(&message);
        }
    }

    fn send(&mut self, message: &Value) {
        if let Some(link) = &mut self.control {
            link.send(message);
        }
    }

    fn tell(&mut self, error: Value) {
        tracing::info!(%error, "vmm.memory_error");
        if self.options.mute_errors {
            return;
        }
        let message = self.untold.add(error);
        if self.welcomed {
            self.send(&message);
        }
    }

    /// The daemon hears of the error at once: the guest may be stopped, and takes its machine check later, if ever.
    fn on_found_early(&mut self, hva: u64) {
        let ram = self.guest.as_ref().map(|guest| guest.memory.ram());
        let block = ram.and_then(|ram| gpa_of(&ram.regions, hva).map(|gpa| ram.block_at(gpa)));
        let Some(block) = block else {
            return tracing::warn!(hva = format!("{hva:#x}"), "vmm.memory_error_outside_guest_memory");
        };
        let Block { gpa, lsb } = block;
        self.tell(json!({"gpa": gpa, "lsb": lsb, "severity": null, "guest_visible": false, "thread": 0}));
        self.inject_action_optional(block, None);
    }

    fn on_poisoned(&self, block: Block, waits: Option<u32>) {
        let Block { gpa, lsb } = block;
        tracing::info!(gpa = format!("{gpa:#x}"), lsb, waits, "pager.memory_error");
        self.inject_action_optional(block, waits);
    }

    fn inject_action_optional(&self, block: Block, waits: Option<u32>) {
        let Block { gpa, .. } = block;
        let Some(guest) = &self.guest else { return };
        guest.machine.command(move |commanded: &mut Commanded| {
            let machine = commanded.machine();
            // A vCPU that waits on the page stumbles over it by itself, and is given its machine check then.
            if waits.is_some_and(|thread| !machine.is_helper(thread)) {
                return;
            }
            if let Err(error) = machine.inject_action_optional(block) {
                tracing::error!(%error, gpa = format!("{gpa:#x}"), "machine.inject_failed");
            }
        });
    }

    fn on_admin(&mut self, command: AdminCommand, reply: &Sender<Value>) -> Flow {
        let answer = match command {
            AdminCommand::Quit => {
                drop(reply.send(json!({"ok": true})));
                return Flow::Exit(0);
            }
            AdminCommand::Status => self.status(),
            AdminCommand::Inject { gpa, tell, means } => match self.inject(gpa, tell, means, reply) {
                Ok(()) => return Flow::Continue,
                Err(error) => json!({"ok": false, "error": error}),
            },
        };
        // The client has hung up: nobody to tell.
        drop(reply.send(answer));
        Flow::Continue
    }

    fn status(&self) -> Value {
        let regions: Vec<_> = self.guest.iter().flat_map(|guest| guest.memory.regions()).map(describe).collect();
        json!({"ok": true, "vm": self.options.vm, "state": self.state.name(), "accel": self.options.accel.name(),
               "pid": std::process::id(), "regions": regions,
               "epoch": self.guest.as_ref().and_then(|guest| guest.epoch)})
    }

    fn inject(&self, gpa: u64, tell: bool, means: Means, reply: &Sender<Value>) -> Result<(), String> {
        let guest = self.guest.as_ref().ok_or("there is no guest")?;
        let block = guest.memory.ram().block_at(gpa);
        if block.gpa < KERNEL_BYTES {
            let size = block.size();
            return Err(format!(
                "{gpa:#x} is in a page of {size:#x} of the guest's kernel, which ends at {KERNEL_BYTES:#x}"
            ));
        }
        let holds = |region: &Region| (region.spec.gpa..region.spec.gpa + region.spec.size).contains(&block.gpa);
        let found = guest.memory.regions().iter().enumerate().find(|(_, region)| holds(region));
        let (number, region) = found.ok_or_else(|| format!("{gpa:#x} is not in guest memory"))?;
        let hva = region.hva + (block.gpa - region.spec.gpa);
        let page = inject::Page { block, hva, shared: region.spec.backing == Backing::Memfd };
        let uffd = guest.uffds.get(number).or(guest.uffds.first()).cloned();
        let (events, reply) = (self.events.clone(), reply.clone());
        guest.machine.command(move |commanded: &mut Commanded| {
            let made: Result<(), String> = commanded
                .paused(|| inject::memory_error(page, means, uffd.as_deref()).map_err(|error| error.to_string()))
                .unwrap_or_else(|error: MachineError| Err(error.to_string()));
            let answer = match made {
                Ok(()) => json!({"ok": true}),
                Err(error) => json!({"ok": false, "error": error}),
            };
            if tell && answer["ok"] == true {
                drop(events.send(Event::Tell(block)));
            }
            drop(reply.send(answer));
        });
        Ok(())
    }
}

fn describe(region: &crate::memory::Region) -> Value {
    json!({"gpa": region.spec.gpa, "hva": region.hva, "size": region.spec.size, "page_size": region.spec.page_size,
           "backing": region.spec.backing})
}
