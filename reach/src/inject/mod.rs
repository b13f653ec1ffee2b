//! One system call, run by a thread of the process.
//!
//! ```text
//!   thread asleep in ppoll           tracer
//!        │ ◀───────────────────────── PTRACE_SEIZE, PTRACE_INTERRUPT
//!   stop 1, in the signal code        save registers and blocked signals; check seccomp;
//!        │                            block signals; registers of the call, at a `syscall` instruction
//!        │ ◀───────────────────────── PTRACE_SYSCALL
//!   stop 2, the call begins ────────▶ PTRACE_SYSCALL
//!   stop 3, the call has ended        read the result
//!        │ ◀───────────────────────── PTRACE_INTERRUPT, PTRACE_CONT
//!   stop 4, in the signal code        restore registers and blocked signals
//!        │ ◀───────────────────────── PTRACE_DETACH
//!   the kernel restarts ppoll
//! ```
//!
//! Only the kernel's signal code turns the interrupted call's result (-514 and the like) into a restart. Stop 4 is inside
//! that code. From stop 3 the thread would reach it only by a side effect of PTRACE_DETACH.

mod call;
mod filter;
mod restart;
mod rseq;
mod thread;
mod tracee;

use std::time::{Duration, Instant};

pub use call::Call;
use tracee::Failure;

use crate::error::Error;
use crate::identity::Process;
use crate::proto::{InjectedCall, Injection, SeccompPolicy};
use crate::sys::signals::{self, Deferred};

/// How long a process may take to die once its threads have ended.
const DYING: Duration = Duration::from_millis(200);

/// Runs calls in one process, and keeps a record of each.
#[derive(Debug)]
pub struct Injector<'a> {
    process: &'a Process,
    excluded: Vec<i32>,
    seccomp: SeccompPolicy,
    /// Each call that was run.
    pub calls: Vec<InjectedCall>,
}

/// What a call returned in its thread.
#[derive(Debug, Clone, Copy)]
struct Done {
    result: i64,
    stopped: Duration,
}

impl<'a> Injector<'a> {
    /// For a process, by the caller's rules.
    #[must_use]
    pub fn new(process: &'a Process, injection: Option<&Injection>) -> Self {
        signals::expect_children();
        let excluded = injection.map(|rules| rules.excluded_threads.as_slice()).unwrap_or_default();
        Self {
            process,
            excluded: excluded.iter().filter_map(|thread| i32::try_from(*thread).ok()).collect(),
            seccomp: injection.map_or(SeccompPolicy::Unspecified, Injection::seccomp),
            calls: Vec::new(),
        }
    }

    /// Runs a call in the first thread that stops, the idle ones first; returns its result.
    ///
    /// # Errors
    /// The call did not run, or failed.
    pub fn run(&mut self, call: &Call) -> Result<u64, Error> {
        let mut last = None;
        for thread in thread::candidates(self.process, &self.excluded)? {
            match self.run_in(thread, call) {
                Ok(done) => return self.finish(thread, call, done),
                Err(Failure::NotBegun(error)) => last = Some(error),
                Err(Failure::Final(error)) => return Err(error),
            }
        }
        // A process that dies loses its threads first.
        if matches!(last, None | Some(Error::ThreadEnded { .. })) && self.process.ends_within(DYING) {
            return Err(Error::Gone { pid: self.process.pid() });
        }
        Err(last.unwrap_or(Error::NoThread { pid: self.process.pid(), excluded: self.excluded.len() }))
    }

    fn run_in(&self, thread: i32, call: &Call) -> Result<Done, Failure> {
        let deferred = Deferred::begin()
            .map_err(|source| Failure::Final(Error::System { what: "block signals".into(), source }))?;
        let began = Instant::now();
        let result = tracee::run(self.process, thread, call, self.seccomp, &deferred)?;
        Ok(Done { result, stopped: began.elapsed() })
    }

    fn finish(&mut self, thread: i32, call: &Call, done: Done) -> Result<u64, Error> {
        let record = InjectedCall {
            thread: thread.cast_unsigned(),
            name: call.name().into(),
            arguments: call.arguments().to_vec(),
            result: done.result,
            stopped_us: u64::try_from(done.stopped.as_micros()).unwrap_or(u64::MAX),
        };
        log(self.process.pid(), &record);
        self.calls.push(record);
        call.check(thread, done.result)
    }
}

fn log(pid: i32, call: &InjectedCall) {
    let line = serde_json::json!({
        "event": "reach.injected", "pid": pid, "thread": call.thread, "call": call.name,
        "arguments": call.arguments, "result": call.result, "stopped_us": call.stopped_us,
    });
    eprintln!("{line}");
}
