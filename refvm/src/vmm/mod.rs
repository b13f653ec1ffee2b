//! The VMM's control loop: the one owner of the VM's state. It never touches guest memory and never blocks on anything
//! that waits for a page. A thread that does sends it an [`Event`] at the end.
//!
//! ```text
//!  control thread ──frames──▶ ┌──────────────┐ ──jobs──▶ machine thread ──▶ vCPU threads
//!  admin threads ──commands─▶ │ control loop │ ◀──done──      │ machine checks
//!  pager link ────poison────▶ └──────────────┘ ◀──────────────┘
//! ```
//! Requests are carried out one after the other; a request that comes during another waits.

mod admin_commands;
mod memory_error_reports;
mod requests;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::admin::AdminEvent;
use crate::control::{ControlEvent, ControlLink};
use crate::guest::FIRST_EPOCH;
use crate::machine::{Block, GuestConfig, GuestMemoryError};
use crate::machine_thread::{Commanded, MachineThread};
use crate::memory::{GuestMemory, Region};
use crate::memory_errors::UnrecordedErrors;
use crate::operation::{Ended, Failure, Guest};
use crate::options::{Options, TestFaults};
use crate::protocol::frame::TooLong;
use crate::protocol::message::{self, BadMessage, FromDaemon, Poisoned, Request, VERSION};
use crate::protocol::state::VmState;

/// An event for the control loop.
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
    /// A memory error was injected, and the daemon must hear of it.
    Injected(Block),
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
    unrecorded: UnrecordedErrors,
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
            unrecorded: UnrecordedErrors::default(),
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
            Event::GuestError(error) => self.report_seen(&error),
            Event::Injected(block) => self.report_unseen(block),
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
                self.unrecorded.waiting().cloned().collect::<Vec<_>>().iter().for_each(|message| self.send(message));
            }
            Ok(FromDaemon::Recorded(seq)) => self.unrecorded.recorded(seq),
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

    fn send(&mut self, message: &Value) {
        if let Some(link) = &mut self.control {
            link.send(message);
        }
    }
}

fn describe(region: &Region) -> Value {
    json!({"gpa": region.spec.gpa, "hva": region.hva, "size": region.spec.size, "page_size": region.spec.page_size,
           "backing": region.spec.backing})
}
