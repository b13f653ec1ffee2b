//! Which registers a thread gets back, so that it does not notice. Pure.
//!
//! The kernel restarts most interrupted calls by itself. A few report EINTR for any interruption, also by a tracer
//! (signal(7), "Interruption of system calls … by stop signals"): those are begun anew here.

use crate::sys::ptrace::Registers;

/// Length of a `syscall` instruction.
const INSTRUCTION_BYTES: u64 = 2;

/// Calls that report EINTR although no handler ran, and that have done nothing then: what begins them anew loses nothing.
/// With the argument that limits the wait, where there is one, and how "no limit" reads there.
const REPORTS_INTERRUPTION: [(i64, Option<(usize, Limit)>); 14] = [
    (libc::SYS_epoll_wait, Some((3, Limit::Negative))),
    (libc::SYS_epoll_pwait, Some((3, Limit::Negative))),
    (libc::SYS_epoll_pwait2, Some((3, Limit::Null))),
    (libc::SYS_semop, None),
    (libc::SYS_semtimedop, Some((3, Limit::Null))),
    (libc::SYS_msgsnd, None),
    (libc::SYS_msgrcv, None),
    (libc::SYS_rt_sigtimedwait, Some((2, Limit::Null))),
    (libc::SYS_io_getevents, Some((4, Limit::Null))),
    (libc::SYS_io_uring_enter, None),
    (libc::SYS_recvfrom, None),
    (libc::SYS_recvmsg, None),
    (libc::SYS_accept, None),
    (libc::SYS_accept4, None),
];

/// How a call without a time limit looks.
#[derive(Debug, Clone, Copy)]
enum Limit {
    Negative,
    Null,
}

/// How much a thread would notice of an interruption of its call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Disturbance {
    /// Nothing: the kernel continues the call, with the time that is left.
    None,
    /// Nothing: the call is begun anew, and has no time limit.
    BegunAnew,
    /// The call is begun anew with its whole time limit.
    WaitsLonger,
}

/// Of a call by its number and arguments.
pub(super) fn disturbance(number: i64, arguments: &[u64]) -> Disturbance {
    let Some((_, limit)) = REPORTS_INTERRUPTION.iter().find(|(known, _)| *known == number) else {
        return Disturbance::None;
    };
    let Some((index, unlimited)) = limit else { return Disturbance::BegunAnew };
    let limit = arguments.get(*index).copied().unwrap_or(0);
    let unlimited = match unlimited {
        Limit::Negative => (limit as i32) < 0,
        Limit::Null => limit == 0,
    };
    if unlimited { Disturbance::BegunAnew } else { Disturbance::WaitsLonger }
}

/// Whether the interruption would show, unless a signal explains it.
pub(super) fn shows_interruption(registers: &Registers) -> bool {
    let interrupted = registers.rax.cast_signed() == -i64::from(libc::EINTR);
    interrupted && disturbance(registers.orig_rax.cast_signed(), &[]) != Disturbance::None
}

/// The registers with which a call is begun anew.
pub(super) fn begun_anew(registers: &Registers) -> Registers {
    Registers { rip: registers.rip - INSTRUCTION_BYTES, rax: registers.orig_rax, ..*registers }
}

#[cfg(test)]
mod tests;
