//! The operations of a request.

mod describe;
mod empty;
mod userfaultfd;

use std::os::fd::OwnedFd;

use crate::error::Error;
use crate::identity::Process;
use crate::inject::{Call, Injector};
use crate::memory::contents;
use crate::proto::reach_reply::Outcome;
use crate::proto::reach_request::Operation;
use crate::proto::{CloseUserfaultfdReply, InjectedCall, ProbeReply, ReadMemoryReply};

/// The parts of a reply besides its outcome.
#[derive(Debug, Default)]
pub struct Carried {
    /// Calls that were run, also by an operation that failed.
    pub calls: Vec<InjectedCall>,
    /// Descriptors to hand over.
    pub descriptors: Vec<OwnedFd>,
}

/// Carries out an operation.
///
/// # Errors
/// The operation failed. Its effects have been undone.
pub fn carry_out(process: &Process, operation: &Operation, carried: &mut Carried) -> Result<Outcome, Error> {
    let mut injector = match operation {
        Operation::Probe(probe) => Injector::new(process, probe.injection.as_ref()),
        Operation::Empty(empty) => Injector::new(process, empty.injection.as_ref()),
        Operation::CreateUserfaultfd(create) => Injector::new(process, create.injection.as_ref()),
        Operation::CloseUserfaultfd(close) => Injector::new(process, close.injection.as_ref()),
        Operation::Describe(_) | Operation::ReadMemory(_) => Injector::new(process, None),
    };
    let outcome = with_injector(process, operation, &mut injector, &mut carried.descriptors);
    carried.calls = injector.calls;
    outcome
}

fn with_injector(
    process: &Process,
    operation: &Operation,
    injector: &mut Injector,
    descriptors: &mut Vec<OwnedFd>,
) -> Result<Outcome, Error> {
    match operation {
        Operation::Probe(_) => injector.run(&Call::getpid()).map(|_| Outcome::Probe(ProbeReply {})),
        Operation::Describe(request) => describe::describe(process, request, descriptors).map(Outcome::Describe),
        Operation::Empty(request) => empty::empty(process, request, injector).map(Outcome::Empty),
        Operation::CreateUserfaultfd(request) => {
            userfaultfd::create(process, request, injector, descriptors).map(Outcome::CreateUserfaultfd)
        }
        Operation::CloseUserfaultfd(request) => userfaultfd::close(process, request.descriptor, injector)
            .map(|()| Outcome::CloseUserfaultfd(CloseUserfaultfdReply {})),
        Operation::ReadMemory(request) => {
            contents::read(process, &request.ranges).map(|contents| Outcome::ReadMemory(ReadMemoryReply { contents }))
        }
    }
}
