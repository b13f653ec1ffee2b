//! The process to reach into. Every later look goes through the directory opened here, so a pid that the kernel gives out
//! again names nobody else.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};

use crate::error::Error;

/// Bit of field 9 of `/proc/PID/stat`, `PF_KTHREAD` in linux/sched.h.
const KERNEL_THREAD: u64 = 0x0020_0000;
/// The same, `PF_IO_WORKER` and `PF_USER_WORKER`.
const IO_WORKER: u64 = 0x10;
const USER_WORKER: u64 = 0x4000;
/// Fields of proc_pid_stat(5).
const FLAGS: usize = 9;
const START_TIME: usize = 22;

/// A process whose pid, start time and pidfd agree.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    pidfd: OwnedFd,
    directory: OwnedFd,
}

impl Process {
    /// Checks that all three name the same process, which lives, runs user code and may be reached.
    ///
    /// # Errors
    /// They do not, or it may not.
    pub fn verify(pid: i32, start_time: u64, pidfd: OwnedFd) -> Result<Self, Error> {
        let of_pidfd = process_of(&pidfd)?;
        if of_pidfd != pid {
            return Err(if of_pidfd < 0 { Error::Gone { pid } } else { Error::Pidfd { pid, actual: of_pidfd } });
        }
        let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory =
            rustix::fs::open(format!("/proc/{pid}"), directory, Mode::empty()).map_err(|_| Error::Gone { pid })?;
        let process = Self { pid, pidfd, directory };
        let stat = process.read("stat")?;
        let actual = stat_field(&stat, START_TIME).unwrap_or(0);
        if actual != start_time {
            return Err(Error::StartTime { pid, given: start_time, actual });
        }
        if stat_field(&stat, FLAGS).unwrap_or(0) & KERNEL_THREAD != 0 {
            return Err(Error::KernelThread { pid });
        }
        process.check_user()?;
        if process.has_ended() { Err(Error::Gone { pid }) } else { Ok(process) }
    }

    /// The thread group id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The pidfd of the request.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Whether every thread has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.ends_within(Duration::ZERO)
    }

    /// Waits for the end of every thread.
    #[must_use]
    pub fn ends_within(&self, limit: Duration) -> bool {
        let mut poll = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let limit = Timespec { tv_sec: limit.as_secs().cast_signed(), tv_nsec: limit.subsec_nanos().into() };
        let ready = rustix::io::retry_on_intr(|| rustix::event::poll(&mut poll, Some(&limit)));
        matches!(ready, Ok(1..))
    }

    /// Opens a file below `/proc/PID`.
    ///
    /// # Errors
    /// [`Self::failed`].
    pub fn open(&self, name: &str, flags: OFlags) -> Result<File, Error> {
        rustix::fs::openat(&self.directory, name, flags | OFlags::CLOEXEC, Mode::empty())
            .map(File::from)
            .map_err(|error| self.failed(format!("open /proc/{}/{name}", self.pid), error.into()))
    }

    /// Reads a file below `/proc/PID` as text.
    ///
    /// # Errors
    /// [`Self::failed`].
    pub fn read(&self, name: &str) -> Result<String, Error> {
        let mut bytes = Vec::new();
        self.open(name, OFlags::RDONLY)?
            .read_to_end(&mut bytes)
            .map_err(|error| self.failed(format!("read /proc/{}/{name}", self.pid), error))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Where a link below `/proc/PID` leads, e.g. `anon_inode:[userfaultfd]`.
    ///
    /// # Errors
    /// [`Self::failed`].
    pub fn link(&self, name: &str) -> Result<String, Error> {
        rustix::fs::readlinkat(&self.directory, name, Vec::new())
            .map(|link| link.to_string_lossy().into_owned())
            .map_err(|error| self.failed(format!("read the link /proc/{}/{name}", self.pid), error.into()))
    }

    /// Lists the numbers that a directory below `/proc/PID` has as names: threads, descriptors.
    ///
    /// # Errors
    /// [`Self::failed`].
    pub fn numbers(&self, name: &str) -> Result<Vec<i32>, Error> {
        let failed = |error: rustix::io::Errno| self.failed(format!("list /proc/{}/{name}", self.pid), error.into());
        let mut numbers = Vec::new();
        for entry in rustix::fs::Dir::read_from(self.open(name, OFlags::RDONLY | OFlags::DIRECTORY)?).map_err(failed)? {
            numbers.extend(entry.map_err(failed)?.file_name().to_string_lossy().parse::<i32>().ok());
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// The error for a look at this process that failed: an end of the process explains it first.
    #[must_use]
    pub fn failed(&self, what: String, source: io::Error) -> Error {
        match source.raw_os_error() {
            Some(libc::ESRCH) => Error::Gone { pid: self.pid },
            _ if self.has_ended() => Error::Gone { pid: self.pid },
            Some(libc::EACCES | libc::EPERM) => Error::Permission {
                what,
                needs: "CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH, or the VMM's own user",
                source,
            },
            _ => Error::System { what, source },
        }
    }

    /// Only root reaches into the processes of others.
    fn check_user(&self) -> Result<(), Error> {
        let own = rustix::process::geteuid();
        if own.is_root() {
            return Ok(());
        }
        let status = self.read("status")?;
        let users =
            status_field(&status, "Uid").unwrap_or_default().split_whitespace().filter_map(|uid| uid.parse().ok());
        match users.into_iter().find(|uid| *uid != own.as_raw()) {
            Some(uid) => Err(Error::OtherUser { pid: self.pid, uid, own: own.as_raw() }),
            None => Ok(()),
        }
    }
}

/// The pid that a pidfd is of, by its fdinfo; -1 once the process has been reaped.
fn process_of(pidfd: &OwnedFd) -> Result<i32, Error> {
    let path = format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd());
    let info =
        std::fs::read_to_string(&path).map_err(|source| Error::System { what: format!("read {path}"), source })?;
    status_field(&info, "Pid").and_then(|pid| pid.parse().ok()).ok_or_else(|| Error::Invalid {
        field: "process.pidfd",
        value: pidfd.as_raw_fd().to_string(),
        remedy: "which is no pidfd; pass one that pidfd_open(2) made",
    })
}

/// Whether a thread of a process runs in the kernel only, by its line of proc_pid_stat(5): workers of io_uring and of KVM.
/// It stops for a tracer, and never runs a system call.
#[must_use]
pub fn is_kernel_worker(stat: &str) -> bool {
    stat_field(stat, FLAGS).unwrap_or(0) & (IO_WORKER | USER_WORKER) != 0
}

/// A number of `/proc/PID/stat` by its place in proc_pid_stat(5), from the third on.
fn stat_field(stat: &str, number: usize) -> Option<u64> {
    // Behind the name, which may hold anything, the third field is the first.
    stat.rsplit_once(')')?.1.split_whitespace().nth(number.checked_sub(3)?)?.parse().ok()
}

/// The value of a `Name:` line, as of `/proc/PID/status`.
#[must_use]
pub fn status_field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

#[cfg(test)]
mod tests;
