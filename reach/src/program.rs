//! The program: reads the request, carries it out, writes the reply.

use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;

use prost::Message;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::error::Error;
use crate::identity::Process;
use crate::operation::{Carried, carry_out};
use crate::proto::reach_reply::Outcome;
use crate::proto::reach_request::Operation;
use crate::proto::{OpenBacking, ReachReply, ReachRequest};
use crate::rights;
use crate::sys::inherited;

/// Most descriptors of one message (`SCM_MAX_FD`).
const MAX_DESCRIPTORS: usize = 253;
/// No reply could be written.
const STREAMS_FAILED: u8 = 3;

/// Carries out the request on standard input.
#[must_use]
pub fn run() -> ExitCode {
    let mut bytes = Vec::new();
    let written = io::stdin().lock().read_to_end(&mut bytes).and_then(|_| {
        let reply = reply(&bytes);
        io::stdout().lock().write_all(&reply.encode_to_vec())?;
        Ok(matches!(reply.outcome, Some(Outcome::Error(_))))
    });
    match written {
        Ok(failed) => ExitCode::from(u8::from(failed)),
        Err(error) => {
            eprintln!("{}", serde_json::json!({"event": "reach.streams_failed", "error": error.to_string()}));
            ExitCode::from(STREAMS_FAILED)
        }
    }
}

fn reply(bytes: &[u8]) -> ReachReply {
    let mut carried = Carried::default();
    let outcome = answer(bytes, &mut carried).unwrap_or_else(|error| {
        carried.descriptors.clear();
        Outcome::Error((&error).into())
    });
    let descriptors = u32::try_from(carried.descriptors.len()).unwrap_or(0);
    ReachReply { outcome: Some(outcome), calls: carried.calls, descriptors }
}

fn answer(bytes: &[u8], carried: &mut Carried) -> Result<Outcome, Error> {
    let invalid = |field, value: &str, remedy| Error::Invalid { field, value: value.into(), remedy };
    let request = ReachRequest::decode(bytes)
        .map_err(|error| invalid("the request", &error.to_string(), "send a vmferry.v1.ReachRequest"))?;
    let operation = request.operation.ok_or_else(|| invalid("operation", "absent", "name one"))?;
    let named = request.process.unwrap_or_default();
    let Ok(pid @ 1..) = i32::try_from(named.pid) else {
        return Err(invalid("process.pid", &named.pid.to_string(), "name a process"));
    };
    let pidfd = take("process.pidfd", named.pidfd)?;
    let socket = match request.descriptor_socket {
        0 => None,
        number => Some(take("descriptor_socket", number)?),
    };
    rights::drop_others(&operation)?;
    let process = Process::verify(pid, named.start_time, pidfd)?;
    if socket.is_none() && hands_over(&operation) {
        return Err(invalid("descriptor_socket", "0", "pass a socket: the reply holds descriptors"));
    }
    let outcome = carry_out(&process, &operation, carried)?;
    if let Some(socket) = socket.filter(|_| !carried.descriptors.is_empty()) {
        send(&socket, &carried.descriptors)?;
    }
    Ok(outcome)
}

fn take(field: &'static str, number: u32) -> Result<OwnedFd, Error> {
    inherited::take(number).map_err(|error| Error::Invalid {
        field,
        value: format!("{number} ({error})"),
        remedy: "pass the descriptor by inheritance",
    })
}

fn hands_over(operation: &Operation) -> bool {
    match operation {
        Operation::CreateUserfaultfd(_) => true,
        Operation::Describe(describe) => describe.open_backing() != OpenBacking::Unspecified,
        _ => false,
    }
}

fn send(socket: &OwnedFd, descriptors: &[OwnedFd]) -> Result<(), Error> {
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fits = ancillary.push(SendAncillaryMessage::ScmRights(&borrowed));
    debug_assert!(fits, "no operation opens more");
    sendmsg(socket, &[IoSlice::new(&[0])], &mut ancillary, SendFlags::NOSIGNAL)
        .map(drop)
        .map_err(|error| Error::System { what: "send descriptors over descriptor_socket".into(), source: error.into() })
}
