//! The admin socket: one JSON object a line, one answer a line. It gives tests and demonstrations the guest's report, and
//! makes memory errors on demand.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{self, Sender};

use serde::Deserialize;
use serde_json::{Value, json};

use crate::inject::Means;
use crate::machine::MappedRegion;
use crate::report_reader;

/// A command for the control loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdminCommand {
    /// State, accelerator, pid, regions and the guest's epoch.
    Status,
    /// Makes a memory error.
    Inject {
        /// The page.
        gpa: u64,
        /// Tell the daemon.
        tell: bool,
        /// How.
        means: Means,
    },
    /// Ends the VMM.
    Quit,
}

/// A command and where its answer goes.
#[derive(Debug)]
pub struct AdminEvent {
    /// The command.
    pub command: AdminCommand,
    /// Takes one answer.
    pub reply: Sender<Value>,
}

/// A line of the socket.
#[derive(Debug, Deserialize)]
#[serde(tag = "cmd", rename_all = "snake_case")]
enum Line {
    Report,
    Status,
    Inject {
        gpa: u64,
        #[serde(default)]
        tell: bool,
        /// Poison the frame itself: the host keeps it out of service until it boots again.
        #[serde(default)]
        real_frame: bool,
    },
    Quit,
}

/// Serves connections for ever, each in a thread: a report may have to wait for a page.
pub fn run<E: From<AdminEvent> + Send + 'static>(listener: &UnixListener, events: &Sender<E>) {
    for stream in listener.incoming() {
        let events = events.clone();
        let serve = move |stream: UnixStream| {
            if let Err(error) = converse(&stream, &events) {
                tracing::debug!(%error, "admin.connection_ended");
            }
        };
        let served = stream
            .and_then(|stream| std::thread::Builder::new().name("admin".into()).spawn(move || serve(stream)).map(drop));
        if let Err(error) = served {
            tracing::warn!(%error, "admin.accept_failed");
        }
    }
}

fn converse<E: From<AdminEvent>>(mut stream: &UnixStream, events: &Sender<E>) -> io::Result<()> {
    for line in BufReader::new(stream).lines() {
        let answer = match serde_json::from_str::<Line>(&line?) {
            Err(error) => failed(&format!("not a command: {error}")),
            Ok(Line::Report) => report(events),
            Ok(Line::Status) => ask(events, AdminCommand::Status),
            Ok(Line::Inject { gpa, tell, real_frame }) => {
                let means = if real_frame { Means::Frame } else { Means::Marker };
                ask(events, AdminCommand::Inject { gpa, tell, means })
            }
            Ok(Line::Quit) => ask(events, AdminCommand::Quit),
        };
        writeln!(stream, "{answer}")?;
    }
    Ok(())
}

fn failed(error: &str) -> Value {
    json!({"ok": false, "error": error})
}

fn ask<E: From<AdminEvent>>(events: &Sender<E>, command: AdminCommand) -> Value {
    let (reply, answer) = mpsc::channel();
    if events.send(AdminEvent { command, reply }.into()).is_err() {
        return failed("the VMM is ending");
    }
    answer.recv().unwrap_or_else(|_| failed("the VMM is ending"))
}

fn report<E: From<AdminEvent>>(events: &Sender<E>) -> Value {
    let status = ask(events, AdminCommand::Status);
    let region = &status["regions"][0];
    let (Some(gpa), Some(hva), Some(size)) = (region["gpa"].as_u64(), region["hva"].as_u64(), region["size"].as_u64())
    else {
        return failed(&format!("there is no guest; state is {}", status["state"]));
    };
    let report = report_reader::read(&MappedRegion { gpa, hva, size }, status["epoch"].as_u64())
        .and_then(|report| serde_json::to_value(report).map_err(io::Error::other));
    match report {
        Ok(Value::Object(mut fields)) => {
            fields.insert("ok".into(), true.into());
            fields.insert("state".into(), status["state"].clone());
            Value::Object(fields)
        }
        Ok(_) => failed("the report is not an object"),
        Err(error) => failed(&format!("report page: {error}")),
    }
}
