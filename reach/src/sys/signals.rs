//! Signals to this program: deferred while a foreign thread is stopped. sigprocmask(2), sigtimedwait(2).

use std::io;
use std::time::{Duration, Instant};

/// Longest single wait for a SIGCHLD: another thread of this process may have taken it.
const RECHECK: Duration = Duration::from_millis(20);

/// Blocks every signal of the calling thread while it lives, so that SIGTERM takes effect only behind it. SIGKILL cannot be
/// blocked.
#[derive(Debug)]
pub struct Deferred {
    before: libc::sigset_t,
    child: libc::sigset_t,
}

impl Deferred {
    /// Blocks them.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn begin() -> io::Result<Self> {
        // SAFETY: sigset_t is plain data that the calls below initialise.
        let [mut all, mut before, mut child] = unsafe { std::mem::zeroed::<[libc::sigset_t; 3]>() };
        // SAFETY: each pointer is to a live set.
        let result = unsafe {
            libc::sigfillset(&raw mut all);
            libc::sigemptyset(&raw mut child);
            libc::sigaddset(&raw mut child, libc::SIGCHLD);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before)
        };
        if result == 0 { Ok(Self { before, child }) } else { Err(io::Error::from_raw_os_error(result)) }
    }

    /// Waits for a SIGCHLD or a while; false: the deadline has passed.
    pub(super) fn wait_for_child(&self, deadline: Option<Instant>) -> io::Result<bool> {
        let left = deadline.map_or(RECHECK, |deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_zero() {
            return Ok(false);
        }
        let timeout = libc::timespec { tv_sec: 0, tv_nsec: left.min(RECHECK).subsec_nanos().into() };
        // SAFETY: both pointers are to live values; no siginfo is wanted.
        let signal = unsafe { libc::sigtimedwait(&raw const self.child, std::ptr::null_mut(), &raw const timeout) };
        if signal >= 0 {
            return Ok(true);
        }
        match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => Ok(true),
            error => Err(error),
        }
    }
}

impl Drop for Deferred {
    fn drop(&mut self) {
        // SAFETY: the set is the one that pthread_sigmask wrote in `begin`.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut()) };
    }
}

/// Makes the kernel tell of stops even if the parent ignores SIGCHLD, which is inherited.
pub fn expect_children() {
    // SAFETY: the default disposition runs no code of this program.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}
