//! ptrace(2) of one thread on x86-64. Each call but [`seize`] and [`interrupt`] needs the thread to be stopped.

use std::io;
use std::time::Instant;

use super::signals::Deferred;

/// General registers, `struct user_regs_struct`.
pub type Registers = libc::user_regs_struct;
/// A set of signals as the kernel has it: bit `n - 1` is signal `n`.
pub type SignalMask = u64;

/// The kernel kills the thread's process when the tracer ends (`PTRACE_O_EXITKILL`).
pub const EXIT_KILL: u64 = libc::PTRACE_O_EXITKILL as u64;
/// Seccomp filters of the thread let everything through (`PTRACE_O_SUSPEND_SECCOMP`, linux/ptrace.h).
pub const SUSPEND_SECCOMP: u64 = 1 << 21;
/// Stops at a system call can be told from signals.
pub const TRACE_SYSTEM_CALLS: u64 = libc::PTRACE_O_TRACESYSGOOD as u64;

/// `PTRACE_SECCOMP_GET_FILTER`, linux/ptrace.h.
const SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
/// `PTRACE_GET_RSEQ_CONFIGURATION`, linux/ptrace.h.
const GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
const EVENT_STOP: i32 = libc::PTRACE_EVENT_STOP;
const SYSTEM_CALL_STOP: i32 = libc::SIGTRAP | 0x80;
const MASK_BYTES: usize = std::mem::size_of::<SignalMask>();

/// Why a thread stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// [`interrupt`] took effect, or the whole process is stopped (SIGSTOP).
    Interrupted,
    /// A system call begins or ends.
    SystemCall,
    /// A signal is about to be delivered.
    Signal(i32),
    /// The thread has ended.
    Ended,
}

/// How far a stopped thread continues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resume {
    /// Until an event.
    Continue,
    /// Until a system call begins or ends.
    ToSystemCall,
}

fn request(request: libc::c_uint, thread: i32, address: usize, data: usize) -> io::Result<libc::c_long> {
    // SAFETY: for these requests the kernel writes at most the buffer at `data`. Each caller passes a live buffer of the size
    // that its request defines, or a plain number.
    match unsafe { libc::ptrace(request, thread, address, data) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

/// Attaches without stopping the thread.
///
/// # Errors
/// `EPERM`: no right to, or traced already. `ESRCH`: no such thread.
pub fn seize(thread: i32, options: u64) -> io::Result<()> {
    request(libc::PTRACE_SEIZE, thread, 0, options as usize).map(drop)
}

/// Makes the thread stop; a sleeping system call is interrupted.
///
/// # Errors
/// The thread has ended.
pub fn interrupt(thread: i32) -> io::Result<()> {
    request(libc::PTRACE_INTERRUPT, thread, 0, 0).map(drop)
}

/// Replaces the options that [`seize`] set.
///
/// # Errors
/// The thread has ended.
pub fn set_options(thread: i32, options: u64) -> io::Result<()> {
    request(libc::PTRACE_SETOPTIONS, thread, 0, options as usize).map(drop)
}

/// Lets a stopped thread run on, and delivers `signal` to it first unless 0.
///
/// # Errors
/// The thread has ended.
pub fn resume(thread: i32, how: Resume, signal: i32) -> io::Result<()> {
    let how = match how {
        Resume::Continue => libc::PTRACE_CONT,
        Resume::ToSystemCall => libc::PTRACE_SYSCALL,
    };
    request(how, thread, 0, signal as usize).map(drop)
}

/// Lets a stopped thread run on untraced.
///
/// # Errors
/// The thread has ended.
pub fn detach(thread: i32) -> io::Result<()> {
    request(libc::PTRACE_DETACH, thread, 0, 0).map(drop)
}

/// Reads the registers.
///
/// # Errors
/// The thread has ended.
pub fn registers(thread: i32) -> io::Result<Registers> {
    // SAFETY: user_regs_struct is plain data; zero is valid for each field.
    let mut registers: Registers = unsafe { std::mem::zeroed() };
    request(libc::PTRACE_GETREGS, thread, 0, &raw mut registers as usize)?;
    Ok(registers)
}

/// Writes the registers.
///
/// # Errors
/// The thread has ended.
pub fn set_registers(thread: i32, registers: &Registers) -> io::Result<()> {
    request(libc::PTRACE_SETREGS, thread, 0, std::ptr::from_ref(registers) as usize).map(drop)
}

/// Reads the blocked signals: inside ppoll(2) and the like, those that it restores when it ends.
///
/// # Errors
/// The thread has ended.
pub fn signal_mask(thread: i32) -> io::Result<SignalMask> {
    let mut mask: SignalMask = 0;
    request(libc::PTRACE_GETSIGMASK, thread, MASK_BYTES, &raw mut mask as usize)?;
    Ok(mask)
}

/// Replaces the blocked signals.
///
/// # Errors
/// The thread has ended.
pub fn set_signal_mask(thread: i32, mask: SignalMask) -> io::Result<()> {
    request(libc::PTRACE_SETSIGMASK, thread, MASK_BYTES, &raw const mask as usize).map(drop)
}

/// Reads the `si_code` of a [`Stop::Signal`]: where the signal comes from, sigaction(2).
///
/// # Errors
/// The thread has ended.
pub fn signal_code(thread: i32) -> io::Result<i32> {
    // SAFETY: siginfo_t is plain data; zero is valid for each field.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    request(libc::PTRACE_GETSIGINFO, thread, 0, &raw mut info as usize)?;
    Ok(info.si_code)
}

/// Reads the `index`-th seccomp filter, the latest first; `None` behind the last.
///
/// # Errors
/// `EACCES` or `EPERM`: no CAP_SYS_ADMIN, or this process has a filter itself. `EINVAL`: seccomp's strict mode.
pub fn seccomp_filter(thread: i32, index: usize) -> io::Result<Option<Vec<libc::sock_filter>>> {
    let length = match request(SECCOMP_GET_FILTER, thread, index, 0) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
        length => length? as usize,
    };
    let mut filter = vec![libc::sock_filter { code: 0, jt: 0, jf: 0, k: 0 }; length];
    request(SECCOMP_GET_FILTER, thread, index, filter.as_mut_ptr() as usize)?;
    Ok(Some(filter))
}

/// Waits for the thread's next stop; `None`: not before the deadline. The SIGCHLD that the kernel sends for a stop must be
/// [`Deferred`].
///
/// # Errors
/// The thread is not traced by this process.
pub fn wait(thread: i32, deadline: Option<Instant>, deferred: &Deferred) -> io::Result<Option<Stop>> {
    loop {
        let mut status = 0;
        // SAFETY: waitpid writes one status.
        match unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL | libc::WNOHANG) } {
            -1 => return Err(io::Error::last_os_error()),
            0 => {}
            _ => return Ok(Some(stop(status))),
        }
        if !deferred.wait_for_child(deadline)? {
            return Ok(None);
        }
    }
}

fn stop(status: i32) -> Stop {
    if !libc::WIFSTOPPED(status) {
        return Stop::Ended;
    }
    match (status >> 16, libc::WSTOPSIG(status)) {
        (EVENT_STOP, _) => Stop::Interrupted,
        (_, SYSTEM_CALL_STOP) => Stop::SystemCall,
        (_, signal) => Stop::Signal(signal),
    }
}

/// Address of the thread's `struct rseq`; 0: it has none (`PTRACE_GET_RSEQ_CONFIGURATION`, Linux 5.13).
///
/// # Errors
/// The thread has ended.
pub fn rseq_area(thread: i32) -> io::Result<u64> {
    /// `struct ptrace_rseq_configuration`: address, then sizes and flags that are of no use here.
    const WORDS: usize = 3;
    let mut configuration = [0u64; WORDS];
    request(GET_RSEQ_CONFIGURATION, thread, WORDS * 8, configuration.as_mut_ptr() as usize)?;
    Ok(configuration[0])
}
