//! The system calls that the program may run in another process: these, and no others.

use std::io;

use crate::error::Error;
use crate::sys::userfaultfd::IOC_NEW;

/// `MADV_DONTNEED_LOCKED`, Linux 5.18: as `MADV_DONTNEED`, also for locked memory.
const DONTNEED_LOCKED: u64 = 24;
/// The highest errno, as a negative result.
const LOWEST_ERROR: i64 = -4095;

/// A system call with its arguments. It passes no pointer, so it reads and writes none of the process's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    name: &'static str,
    number: i64,
    arguments: Vec<u64>,
    remedy: &'static str,
}

impl Call {
    /// getpid(2): changes nothing.
    #[must_use]
    pub fn getpid() -> Self {
        Self { name: "getpid", number: libc::SYS_getpid, arguments: Vec::new(), remedy: "" }
    }

    /// userfaultfd(2), or `USERFAULTFD_IOC_NEW` on a descriptor of `/dev/userfaultfd` in the process.
    #[must_use]
    pub fn userfaultfd(device: Option<u32>) -> Self {
        let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK).cast_unsigned().into();
        match device {
            Some(device) => Self {
                name: "ioctl",
                number: libc::SYS_ioctl,
                arguments: vec![device.into(), IOC_NEW, flags],
                remedy: "",
            },
            None => Self {
                name: "userfaultfd",
                number: libc::SYS_userfaultfd,
                arguments: vec![flags],
                remedy: "; EPERM: hand /dev/userfaultfd to the VMM and name its descriptor in `device`",
            },
        }
    }

    /// close(2).
    #[must_use]
    pub fn close(descriptor: u32) -> Self {
        Self { name: "close", number: libc::SYS_close, arguments: vec![descriptor.into()], remedy: "" }
    }

    /// madvise(2) that drops private pages.
    #[must_use]
    pub fn drop_pages(start: u64, size: u64) -> Self {
        let arguments = vec![start, size, DONTNEED_LOCKED];
        Self { name: "madvise", number: libc::SYS_madvise, arguments, remedy: "" }
    }

    /// For logs and messages.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// As given to the kernel.
    #[must_use]
    pub fn arguments(&self) -> &[u64] {
        &self.arguments
    }

    pub(super) fn number(&self) -> u64 {
        self.number.cast_unsigned()
    }

    /// An argument; 0 behind the last.
    pub(super) fn argument(&self, index: usize) -> u64 {
        self.arguments.get(index).copied().unwrap_or(0)
    }

    /// Tells a result from an error number.
    pub(super) fn check(&self, thread: i32, result: i64) -> Result<u64, Error> {
        if !(LOWEST_ERROR..0).contains(&result) {
            return Ok(result.cast_unsigned());
        }
        let source = io::Error::from_raw_os_error(i32::try_from(-result).unwrap_or(libc::EINVAL));
        Err(Error::Call { thread, call: self.name, source, remedy: self.remedy })
    }
}
