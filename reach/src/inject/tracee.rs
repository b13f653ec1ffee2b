//! The one thread that is stopped. It always gets its registers and blocked signals back.

use std::io;
use std::time::{Duration, Instant};

use super::call::Call;
use super::{filter, restart, rseq, thread};
use crate::error::Error;
use crate::identity::{Process, status_field};
use crate::proto::SeccompPolicy;
use crate::sys::memory;
use crate::sys::ptrace::{self, Registers, Resume, SignalMask, Stop};
use crate::sys::signals::Deferred;
use crate::sys::vdso;

/// How long a thread has to stop before anything was changed in it.
const FIRST_STOP: Duration = Duration::from_millis(300);
/// After which a call that does not return is interrupted, again and again.
const CALL_RETURNS: Duration = Duration::from_secs(1);
/// The code segment of 64-bit programs, `__USER_CS`.
const USER_CS: u64 = 0x33;
/// `si_code` of a SIGSYS from a seccomp filter.
const SYS_SECCOMP: i32 = 1;
/// `orig_rax` of a thread that is in no system call, so that the kernel restarts none.
const NO_CALL: u64 = u64::MAX;
const STRICT: &str = "1";

/// Why a call did not run.
#[derive(Debug)]
pub(super) enum Failure {
    /// Nothing was changed: another thread may be tried.
    NotBegun(Error),
    /// Another thread would fare no better, or the call may have run.
    Final(Error),
}

/// Runs a call in a thread and lets it go.
pub(super) fn run(
    process: &Process,
    thread: i32,
    call: &Call,
    policy: SeccompPolicy,
    deferred: &Deferred,
) -> Result<i64, Failure> {
    let mut tracee = Tracee::seize(process, thread, policy, deferred)?;
    tracee.stop()?;
    let outcome = tracee.run(call, policy);
    let released = tracee.release();
    let result = outcome.map_err(Failure::Final)?;
    released.map_err(Failure::Final)?;
    Ok(result)
}

#[derive(Debug)]
struct Tracee<'a> {
    process: &'a Process,
    thread: i32,
    options: u64,
    deferred: &'a Deferred,
    /// To be restored; `None`: nothing was changed.
    saved: Option<(Registers, SignalMask)>,
}

/// Where [`Tracee::advance`] came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Advance {
    Reached,
    /// A seccomp filter sent SIGSYS instead of running the call.
    Trapped,
    Faulted(i32),
}

impl<'a> Tracee<'a> {
    fn seize(
        process: &'a Process,
        thread: i32,
        policy: SeccompPolicy,
        deferred: &'a Deferred,
    ) -> Result<Self, Failure> {
        let suspend = if policy == SeccompPolicy::Suspend { ptrace::SUSPEND_SECCOMP } else { 0 };
        let options = ptrace::TRACE_SYSTEM_CALLS | suspend;
        ptrace::seize(thread, options).map_err(|error| not_seized(process, thread, policy, error))?;
        let tracee = Self { process, thread, options, deferred, saved: None };
        // While it is seized its id cannot pass to another process.
        if process.has_ended() || process.read(&format!("task/{thread}/status")).is_err() {
            return Err(Failure::NotBegun(Error::ThreadEnded { thread }));
        }
        Ok(tracee)
    }

    /// Stops the thread. One that does not stop in time stays seized until the program exits, and runs on.
    fn stop(&mut self) -> Result<(), Failure> {
        let thread = self.thread;
        let deadline = Instant::now() + FIRST_STOP;
        let ended = |_| Failure::NotBegun(Error::ThreadEnded { thread });
        ptrace::interrupt(thread).map_err(ended)?;
        loop {
            match ptrace::wait(thread, Some(deadline), self.deferred).map_err(ended)? {
                Some(Stop::Interrupted) => return Ok(()),
                Some(Stop::Signal(signal)) => ptrace::resume(thread, Resume::Continue, signal).map_err(ended)?,
                Some(Stop::SystemCall) => ptrace::resume(thread, Resume::Continue, 0).map_err(ended)?,
                Some(Stop::Ended) => return Err(ended(io::Error::from_raw_os_error(libc::ESRCH))),
                None => return Err(Failure::NotBegun(Error::NotStopped { thread })),
            }
        }
    }

    /// Runs the call in the stopped thread.
    fn run(&mut self, call: &Call, policy: SeccompPolicy) -> Result<i64, Error> {
        let before = self.kernel(ptrace::registers(self.thread))?;
        let mask = self.kernel(ptrace::signal_mask(self.thread))?;
        if before.cs != USER_CS {
            return Err(Error::NotX8664 { thread: self.thread, cs: before.cs });
        }
        let status = self.process.read(&format!("task/{}/status", self.thread))?;
        let at = self.find_instruction(&before)?;
        self.check_seccomp(call, at, &status, policy)?;
        self.saved = Some((self.to_restore(&before, &status), mask));
        self.kernel(ptrace::set_options(self.thread, self.options | ptrace::EXIT_KILL))?;
        self.kernel(ptrace::set_signal_mask(self.thread, !bit(libc::SIGSYS)))?;
        self.kernel(ptrace::set_registers(self.thread, &registers_for(call, at, &before)))?;
        for _entry_and_exit in 0..2 {
            self.reach(Resume::ToSystemCall, call)?;
        }
        let result = self.kernel(ptrace::registers(self.thread))?.rax;
        // The kernel leaves the number of a call that a filter traps, and sends a signal.
        if result == call.number() && self.signal_is_pending(libc::SIGSYS)? {
            self.reach(Resume::Continue, call)?;
        }
        Ok(result.cast_signed())
    }

    /// Restores the thread and detaches from it.
    fn release(mut self) -> Result<(), Error> {
        if let Some((registers, mask)) = self.saved.take() {
            self.kernel(ptrace::interrupt(self.thread))?;
            // A signal of the foreign call's is dropped here.
            while self.advance(Resume::Continue)? != Advance::Reached {}
            self.kernel(ptrace::set_registers(self.thread, &registers))?;
            self.kernel(ptrace::set_signal_mask(self.thread, mask))?;
            self.kernel(ptrace::set_options(self.thread, self.options))?;
        }
        self.kernel(ptrace::detach(self.thread))
    }

    /// Lets the thread run to the next stop of a kind; any other end is an error.
    fn reach(&mut self, how: Resume, call: &Call) -> Result<(), Error> {
        let (thread, call) = (self.thread, call.name());
        match self.advance(how)? {
            Advance::Reached => Ok(()),
            Advance::Trapped => Err(Error::SeccompForbids { thread, call, action: "TRAP" }),
            Advance::Faulted(signal) => Err(Error::Faulted { thread, call, signal }),
        }
    }

    fn advance(&mut self, how: Resume) -> Result<Advance, Error> {
        let mut signal = 0;
        loop {
            self.kernel(ptrace::resume(self.thread, how, signal))?;
            signal = 0;
            match (self.wait_for_call()?, how) {
                (Stop::SystemCall, Resume::ToSystemCall) | (Stop::Interrupted, Resume::Continue) => {
                    return Ok(Advance::Reached);
                }
                (Stop::SystemCall | Stop::Interrupted, _) => {}
                (Stop::Ended, _) => return Err(Error::Gone { pid: self.process.pid() }),
                (Stop::Signal(sent), _) => match (sent, self.kernel(ptrace::signal_code(self.thread))?) {
                    (libc::SIGSYS, SYS_SECCOMP) => return Ok(Advance::Trapped),
                    (libc::SIGSEGV | libc::SIGBUS | libc::SIGILL | libc::SIGFPE | libc::SIGTRAP, 1..) => {
                        return Ok(Advance::Faulted(sent));
                    }
                    // The kernel queues a signal again that is blocked when it is delivered.
                    _ => {
                        self.kernel(ptrace::set_signal_mask(self.thread, SignalMask::MAX))?;
                        signal = sent;
                    }
                },
            }
        }
    }

    /// Waits as long as it takes: the thread must get its registers back.
    fn wait_for_call(&self) -> Result<Stop, Error> {
        loop {
            let deadline = Instant::now() + CALL_RETURNS;
            match self.kernel(ptrace::wait(self.thread, Some(deadline), self.deferred))? {
                Some(stop) => return Ok(stop),
                None => self.kernel(ptrace::interrupt(self.thread))?,
            }
        }
    }

    /// Finds a `syscall` instruction: the last one that the thread ran, else the vDSO's.
    fn find_instruction(&self, registers: &Registers) -> Result<u64, Error> {
        let last = registers.rip.wrapping_sub(vdso::SYSCALL_INSTRUCTION.len() as u64);
        if self.has_instruction(last)? {
            return Ok(last);
        }
        let base = self.process.read("maps")?.lines().find_map(vdso_base);
        match base.zip(vdso::syscall_offset()).map(|(base, offset)| base + offset) {
            Some(at) if self.has_instruction(at)? => Ok(at),
            _ => Err(Error::NoInstruction { thread: self.thread }),
        }
    }

    fn has_instruction(&self, at: u64) -> Result<bool, Error> {
        let mut bytes = [0; 2];
        match memory::read(self.thread, at, &mut bytes) {
            Ok(read) => Ok(read == bytes.len() && bytes == vdso::SYSCALL_INSTRUCTION),
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => Ok(false),
            Err(error) => Err(self.process.failed(format!("read the code of thread {}", self.thread), error)),
        }
    }

    fn check_seccomp(&self, call: &Call, at: u64, status: &str, policy: SeccompPolicy) -> Result<(), Error> {
        let (thread, name) = (self.thread, call.name());
        let mode = status_field(status, "Seccomp").unwrap_or_default();
        match policy {
            _ if mode.is_empty() || mode == "0" => return Ok(()),
            SeccompPolicy::Suspend => return Ok(()),
            _ if mode == STRICT => {
                return Err(Error::SeccompForbids { thread, call: name, action: "KILL_THREAD" });
            }
            SeccompPolicy::Trust => return Ok(()),
            SeccompPolicy::Unspecified => {}
        }
        let unreadable = |source| Error::SeccompUnreadable { thread, call: name, source };
        let filters: Vec<_> = (0..)
            .map_while(|index| ptrace::seccomp_filter(thread, index).transpose())
            .collect::<Result<_, _>>()
            .map_err(unreadable)?;
        let arguments = std::array::from_fn(|index| call.argument(index));
        let ip = at + vdso::SYSCALL_INSTRUCTION.len() as u64;
        match filter::refusal(filter::answer(&filters, &filter::Data::new(call.number(), ip, arguments))) {
            None => Ok(()),
            Some(action) => Err(Error::SeccompForbids { thread, call: name, action }),
        }
    }

    /// The registers to restore, by registers and status at the first stop.
    fn to_restore(&self, before: &Registers, status: &str) -> Registers {
        if before.orig_rax.cast_signed() < 0 {
            return Registers { rip: rseq::resumes_at(self.thread, before.rip), ..*before };
        }
        if restart::shows_interruption(before) && !has_deliverable(status) {
            return restart::begun_anew(before);
        }
        *before
    }

    fn signal_is_pending(&self, signal: i32) -> Result<bool, Error> {
        let status = self.process.read(&format!("task/{}/status", self.thread))?;
        Ok(mask_field(&status, "SigPnd") & bit(signal) != 0)
    }

    /// A thread that is gone has taken its process with it: it cannot exit by itself while it runs the call.
    fn kernel<T>(&self, result: io::Result<T>) -> Result<T, Error> {
        result.map_err(|source| match source.raw_os_error() {
            Some(libc::ESRCH | libc::ECHILD) => Error::Gone { pid: self.process.pid() },
            _ => Error::System { what: format!("ptrace thread {}", self.thread), source },
        })
    }
}

fn not_seized(process: &Process, thread: i32, policy: SeccompPolicy, source: io::Error) -> Failure {
    let status = process.read(&format!("task/{thread}/status")).unwrap_or_default();
    // A thread that is about to end cannot be traced either.
    if source.raw_os_error() == Some(libc::ESRCH) || thread::has_ended(&status) {
        return Failure::NotBegun(Error::ThreadEnded { thread });
    }
    if let Err(traced) = thread::check_untraced(thread, &status) {
        return Failure::Final(traced);
    }
    let needs = match policy {
        SeccompPolicy::Suspend => "CAP_SYS_PTRACE and CAP_SYS_ADMIN, and no seccomp filter on vmferry-reach itself",
        _ => "CAP_SYS_PTRACE, and no security module that forbids it (kernel.yama.ptrace_scope below 3)",
    };
    Failure::Final(Error::Permission { what: format!("to trace thread {thread}"), needs, source })
}

fn registers_for(call: &Call, at: u64, before: &Registers) -> Registers {
    Registers {
        rip: at,
        rax: call.number(),
        orig_rax: NO_CALL,
        rdi: call.argument(0),
        rsi: call.argument(1),
        rdx: call.argument(2),
        r10: call.argument(3),
        r8: call.argument(4),
        r9: call.argument(5),
        ..*before
    }
}

/// Whether a signal is pending that the interrupted call did not block: it explains an EINTR.
fn has_deliverable(status: &str) -> bool {
    let pending = mask_field(status, "SigPnd") | mask_field(status, "ShdPnd");
    pending & !mask_field(status, "SigBlk") != 0
}

fn mask_field(status: &str, name: &str) -> SignalMask {
    status_field(status, name).and_then(|mask| SignalMask::from_str_radix(mask, 16).ok()).unwrap_or(0)
}

fn bit(signal: i32) -> SignalMask {
    1 << (signal - 1)
}

fn vdso_base(line: &str) -> Option<u64> {
    let start = line.strip_suffix("[vdso]")?.split('-').next()?;
    u64::from_str_radix(start, 16).ok()
}
