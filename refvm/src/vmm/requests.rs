//! Requests of the daemon, carried out one after the other.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{Asked, Flow, Vmm, now_us};
use crate::operation::{self, Done, Failure};
use crate::protocol::message::{self, Request};
use crate::protocol::state::{Decision, Verb, VmState, decide};

impl Vmm {
    pub(super) fn on_request(&mut self, connection: u64, id: u64, request: Request) -> Flow {
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

    pub(super) fn next_request(&mut self) -> Flow {
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

    pub(super) fn on_done(&mut self, result: Result<Done, Failure>) -> Flow {
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
}
