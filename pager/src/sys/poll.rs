//! Waits for descriptors (poll(2)).

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Waits until a descriptor can be read, or `timeout` is over; `None` waits for ever. Returns whether each of them is ready.
/// An error or a hang-up counts as ready, since the next read tells of it.
pub fn wait_readable<'a>(fds: impl IntoIterator<Item = BorrowedFd<'a>>, timeout: Option<Duration>) -> Vec<bool> {
    let mut all: Vec<_> = fds.into_iter().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
    wait(&mut all, timeout);
    all.iter().map(|fd| !fd.revents().is_empty()).collect()
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
