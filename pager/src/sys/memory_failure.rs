//! When the kernel tells this process of bad frames (prctl(2), `PR_MCE_KILL`).

use std::io;

/// `si_code` of a frame that the host found bad, and that no thread of ours touched (sigaction(2)).
pub(crate) const BUS_MCEERR_AO: libc::c_int = 5;
const PR_MCE_KILL: libc::c_int = 33;
const PR_MCE_KILL_SET: libc::c_ulong = 1;
const PR_MCE_KILL_LATE: libc::c_ulong = 0;

/// Keeps the kernel from signalling bad frames that no thread of this process touches. A pager maps guest memory: where
/// `vm.memory_failure_early_kill` is set, each would be a SIGBUS. Threads inherit this from the thread that starts them, so
/// `main` calls it first.
///
/// # Errors
/// As prctl(2).
pub fn refuse_early_errors() -> io::Result<()> {
    // SAFETY: numbers only.
    match unsafe { libc::prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_LATE, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
