//! Waits for descriptors (poll(2)).

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// The descriptors of one wait, each ready or not. An error or a hang-up counts as ready, since the next read reports it.
#[derive(Debug)]
pub struct Ready<'a>(Vec<PollFd<'a>>);

impl Ready<'_> {
    /// Number of descriptors.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Whether one of these is ready.
    pub fn any(&self, numbers: Range<usize>) -> bool {
        self.0[numbers].iter().any(|fd| !fd.revents().is_empty())
    }
}

/// Waits until a descriptor can be read, or `timeout` is over; `None` waits for ever.
pub fn wait_readable<'a>(fds: impl IntoIterator<Item = BorrowedFd<'a>>, timeout: Option<Duration>) -> Ready<'a> {
    let mut all: Vec<_> = fds.into_iter().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
    wait(&mut all, timeout);
    Ready(all)
}

/// Waits until a descriptor can be written, or `timeout` is over; whether it can.
pub fn wait_writable(fd: impl AsFd, timeout: Duration) -> bool {
    let mut one = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::OUT)];
    wait(&mut one, Some(timeout));
    !one[0].revents().is_empty()
}

/// A signal ends the wait early: callers look again anyway.
fn wait(fds: &mut [PollFd<'_>], timeout: Option<Duration>) {
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    let _ = poll(fds, timeout.as_ref());
}
