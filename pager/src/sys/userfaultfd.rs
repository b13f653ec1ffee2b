//! The userfaultfd ABI (`linux/userfaultfd.h`, ioctl_userfaultfd(2)), and the meaning of each error.
//!
//! | errno | outcome | the pager |
//! |---|---|---|
//! | `EEXIST` | [`Stop::AlreadyPresent`] | the page at `done` is there: it counts as installed (POISON: as marked); wake it, continue behind it |
//! | `EAGAIN`, bytes done | none: the call continues at `start + done` | |
//! | `EAGAIN`, nothing done | [`Stop::Changing`] | fork, mremap or madvise is under way in the VMM: read events, then try again |
//! | `ENOENT` | [`Stop::NotRegistered`] | the range is no longer registered or mapped: the VMM gave it back |
//! | `ESRCH` | [`Stop::ProcessGone`] | the VMM's address space is gone: nothing left to serve |
//! | `ENOMEM` | [`Stop::NoMemory`] | the page goes back to ABSENT; tried again after a pause |
//! | other | [`Stop::Refused`] | a fault of this program or kernel: reported, the page goes back to ABSENT |

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::layout::Hva;
use crate::sys::fd_passing;

const UFFD_API: u64 = 0xAA;
const UFFDIO_API: u64 = 0xC018_AA3F;
const UFFDIO_REGISTER: u64 = 0xC020_AA00;
const UFFDIO_UNREGISTER: u64 = 0x8010_AA01;
const UFFDIO_WAKE: u64 = 0x8010_AA02;
const UFFDIO_COPY: u64 = 0xC028_AA03;
const UFFDIO_ZEROPAGE: u64 = 0xC020_AA04;
const UFFDIO_CONTINUE: u64 = 0xC020_AA07;
const UFFDIO_POISON: u64 = 0xC020_AA08;
const USERFAULTFD_IOC_NEW: u64 = 0xAA00;
const REGISTER_MODE_MISSING: u64 = 1;
const REGISTER_MODE_MINOR: u64 = 4;
/// Bit of `uffdio_register.ioctls`.
const IOCTL_CONTINUE: u64 = 1 << 7;
const PAGEFAULT_FLAG_MINOR: u64 = 4;
const MESSAGE_BYTES: usize = 32;
/// Events that are read at once, at most.
pub const MAX_EVENTS_A_READ: usize = 64;

/// Features of `UFFDIO_API` that the pager knows by name.
pub mod feature {
    /// Reports `fork` of the VMM.
    pub const EVENT_FORK: u64 = 1 << 1;
    /// Reports `mremap` of the VMM.
    pub const EVENT_REMAP: u64 = 1 << 2;
    /// Reports `madvise(MADV_DONTNEED | MADV_REMOVE)` of the VMM.
    pub const EVENT_REMOVE: u64 = 1 << 3;
    /// Missing faults on hugetlb.
    pub const MISSING_HUGETLBFS: u64 = 1 << 4;
    /// Missing faults on shared memory.
    pub const MISSING_SHMEM: u64 = 1 << 5;
    /// Reports `munmap` of the VMM.
    pub const EVENT_UNMAP: u64 = 1 << 6;
    /// A fault names the thread that waits.
    pub const THREAD_ID: u64 = 1 << 8;
    /// Minor faults on hugetlb, Linux 5.13.
    pub const MINOR_HUGETLBFS: u64 = 1 << 9;
    /// Minor faults on shared memory, Linux 5.14.
    pub const MINOR_SHMEM: u64 = 1 << 10;
    /// `UFFDIO_POISON`, Linux 6.6.
    pub const POISON: u64 = 1 << 14;

    /// Their kernel names.
    pub const NAMES: [(u64, &str); 10] = [
        (EVENT_FORK, "UFFD_FEATURE_EVENT_FORK"),
        (EVENT_REMAP, "UFFD_FEATURE_EVENT_REMAP"),
        (EVENT_REMOVE, "UFFD_FEATURE_EVENT_REMOVE"),
        (MISSING_HUGETLBFS, "UFFD_FEATURE_MISSING_HUGETLBFS"),
        (MISSING_SHMEM, "UFFD_FEATURE_MISSING_SHMEM"),
        (EVENT_UNMAP, "UFFD_FEATURE_EVENT_UNMAP"),
        (THREAD_ID, "UFFD_FEATURE_THREAD_ID"),
        (MINOR_HUGETLBFS, "UFFD_FEATURE_MINOR_HUGETLBFS"),
        (MINOR_SHMEM, "UFFD_FEATURE_MINOR_SHMEM"),
        (POISON, "UFFD_FEATURE_POISON"),
    ];
}

/// Why a range ioctl stopped before the end of its range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stop {
    /// `EEXIST`.
    AlreadyPresent,
    /// `EAGAIN` with nothing done.
    Changing,
    /// `ENOENT`.
    NotRegistered,
    /// `ESRCH`.
    ProcessGone,
    /// `ENOMEM`.
    NoMemory,
    /// Another errno.
    Refused(i32),
}

impl Stop {
    /// The same may well be possible a moment later.
    pub fn passes(self) -> bool {
        matches!(self, Self::AlreadyPresent | Self::Changing | Self::NoMemory)
    }

    fn of(errno: i32) -> Self {
        match errno {
            libc::EEXIST => Self::AlreadyPresent,
            libc::EAGAIN => Self::Changing,
            libc::ENOENT => Self::NotRegistered,
            libc::ESRCH => Self::ProcessGone,
            libc::ENOMEM => Self::NoMemory,
            other => Self::Refused(other),
        }
    }
}

/// How far a range ioctl came: `done` bytes from the start, and why not further (`None`: all done).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes.
    pub done: u64,
    /// `None` when the whole range is done.
    pub stop: Option<Stop>,
}

/// One event.
#[derive(Debug, PartialEq, Eq)]
pub enum UffdEvent {
    /// A thread touched a page that is not mapped, and waits.
    Fault {
        /// The address, not rounded to the page.
        at: Hva,
        /// Thread id in the VMM's pid namespace; 0 without `UFFD_FEATURE_THREAD_ID`.
        thread: u32,
        /// The file behind the mapping holds the page; only the mapping does not.
        minor: bool,
    },
    /// The range is about to be dropped by madvise.
    Remove {
        /// First byte.
        start: Hva,
        /// One past the last.
        end: Hva,
    },
    /// The range is about to be unmapped.
    Unmap {
        /// First byte.
        start: Hva,
        /// One past the last.
        end: Hva,
    },
    /// The range was moved.
    Remap {
        /// First byte before.
        from: Hva,
        /// First byte now.
        to: Hva,
        /// Bytes.
        size: u64,
    },
    /// The VMM forked; this is the child's userfaultfd.
    Fork(ChildUffd),
    /// An event of a kernel newer than this program.
    Unknown(u8),
}

/// The userfaultfd of a forked child.
#[derive(Debug)]
pub struct ChildUffd(OwnedFd);

impl PartialEq for ChildUffd {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_raw_fd() == other.0.as_raw_fd()
    }
}

impl Eq for ChildUffd {}

impl From<ChildUffd> for OwnedFd {
    fn from(child: ChildUffd) -> Self {
        child.0
    }
}

/// A userfaultfd, mostly the VMM's, received from it: its ioctls act on the VMM's address space.
#[derive(Debug)]
pub struct Userfaultfd {
    fd: OwnedFd,
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Userfaultfd {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Userfaultfd {
    /// Takes a received descriptor; makes it non-blocking, as polling a userfaultfd requires.
    ///
    /// # Errors
    /// The descriptor is no userfaultfd (`InvalidInput`), or fcntl fails.
    pub fn adopt(fd: OwnedFd) -> io::Result<Self> {
        let link = fd_passing::opened_on(&fd)?;
        if link.as_os_str() != "anon_inode:[userfaultfd]" {
            let message = format!("descriptor is {}, not a userfaultfd", link.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        rustix::fs::fcntl_setfl(&fd, fd_passing::flags(&fd)? | rustix::fs::OFlags::NONBLOCK)?;
        Ok(Self { fd })
    }

    /// Makes a userfaultfd for this process, for probes and tests. It also reports faults in kernel mode, so it needs
    /// `CAP_SYS_PTRACE`, `vm.unprivileged_userfaultfd=1`, or `/dev/userfaultfd`.
    ///
    /// # Errors
    /// The error of the last of these ways.
    pub fn create() -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: userfaultfd(2) takes flags only and returns a descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        if let Ok(fd @ 0..) = RawFd::try_from(fd) {
            // SAFETY: a new descriptor that nobody else owns.
            return Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } });
        }
        let device = std::fs::File::open("/dev/userfaultfd")?;
        // SAFETY: USERFAULTFD_IOC_NEW takes flags by value and returns a descriptor or -1.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Another descriptor of the same userfaultfd.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { fd: self.fd.try_clone()? })
    }

    /// The descriptor, to hand it over.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// `UFFDIO_API`: requests features and returns those that the kernel has. Once a descriptor.
    ///
    /// # Errors
    /// `EINVAL`: a feature that this kernel lacks, or asked before.
    pub fn enable(&self, features: u64) -> io::Result<u64> {
        let mut api = [UFFD_API, features, 0];
        self.ioctl(UFFDIO_API, &mut api)?;
        Ok(api[1])
    }

    /// `UFFDIO_REGISTER` for missing faults.
    ///
    /// # Errors
    /// ioctl_userfaultfd(2).
    pub fn register(&self, start: Hva, size: u64) -> io::Result<()> {
        self.ioctl(UFFDIO_REGISTER, &mut [start.0, size, REGISTER_MODE_MISSING, 0])
    }

    /// `UFFDIO_REGISTER` for missing and minor faults: a minor fault is one on a page that the file behind the mapping holds,
    /// and the mapping does not. It changes a range that this descriptor has registered already.
    ///
    /// # Errors
    /// ioctl_userfaultfd(2); `Unsupported` if the kernel cannot CONTINUE there.
    pub fn register_minor(&self, start: Hva, size: u64) -> io::Result<()> {
        let mut register = [start.0, size, REGISTER_MODE_MISSING | REGISTER_MODE_MINOR, 0];
        self.ioctl(UFFDIO_REGISTER, &mut register)?;
        if register[3] & IOCTL_CONTINUE == 0 { Err(io::ErrorKind::Unsupported.into()) } else { Ok(()) }
    }

    /// `UFFDIO_UNREGISTER`; wakes the threads that wait there. A page that has not arrived would then read as zeros, so no page
    /// of the range may be missing.
    ///
    /// # Errors
    /// ioctl_userfaultfd(2).
    pub fn unregister(&self, start: Hva, size: u64) -> io::Result<()> {
        self.ioctl(UFFDIO_UNREGISTER, &mut [start.0, size])
    }

    /// `UFFDIO_WAKE`: threads that wait in the range try again.
    ///
    /// # Errors
    /// ioctl_userfaultfd(2).
    pub fn wake(&self, start: Hva, size: u64) -> io::Result<()> {
        self.ioctl(UFFDIO_WAKE, &mut [start.0, size])
    }

    /// `UFFDIO_COPY` and wake. Over a poison marker it would succeed and un-poison: only for claimed pages.
    pub fn copy(&self, start: Hva, data: &[u8]) -> Progress {
        let size = data.len() as u64;
        self.over_range(size, |done| {
            let source = data.as_ptr() as u64 + done;
            let mut copy = [start.0 + done, source, size - done, 0, 0];
            (self.ioctl(UFFDIO_COPY, &mut copy), copy[4])
        })
    }

    /// `UFFDIO_CONTINUE` and wake: maps pages that the file behind the mapping holds already; `EFAULT` where it does not. Over a
    /// poison marker it would succeed and un-poison: only for claimed pages.
    pub fn map(&self, start: Hva, size: u64) -> Progress {
        self.over_range(size, |done| {
            let mut map = [start.0 + done, size - done, 0, 0];
            (self.ioctl(UFFDIO_CONTINUE, &mut map), map[3])
        })
    }

    /// `UFFDIO_ZEROPAGE` and wake; not on hugetlb.
    pub fn zeropage(&self, start: Hva, size: u64) -> Progress {
        self.over_range(size, |done| {
            let mut zero = [start.0 + done, size - done, 0, 0];
            (self.ioctl(UFFDIO_ZEROPAGE, &mut zero), zero[3])
        })
    }

    /// `UFFDIO_POISON` and wake.
    pub fn poison(&self, start: Hva, size: u64) -> Progress {
        self.over_range(size, |done| {
            let mut poison = [start.0 + done, size - done, 0, 0];
            (self.ioctl(UFFDIO_POISON, &mut poison), poison[3])
        })
    }

    /// Repeats a range ioctl until the end or a stop. The ioctl reports in a signed field how many bytes it did.
    fn over_range(&self, size: u64, mut once: impl FnMut(u64) -> (io::Result<()>, u64)) -> Progress {
        let mut done = 0;
        while done < size {
            let (result, field) = once(done);
            let advanced = i64::try_from(field).map_or(0, |n| n.max(0) as u64);
            match result {
                Ok(()) => done = size,
                Err(_) if advanced > 0 => done += advanced,
                Err(error) => {
                    return Progress { done, stop: Some(Stop::of(error.raw_os_error().unwrap_or(0))) };
                }
            }
        }
        Progress { done, stop: None }
    }

    fn ioctl<const N: usize>(&self, request: u64, argument: &mut [u64; N]) -> io::Result<()> {
        // SAFETY: each request's struct is N 64-bit words, as the callers lay out; the kernel writes at most N.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), request, argument.as_mut_ptr()) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Reads the events that are there, at most [`MAX_EVENTS_A_READ`]; none is no error.
    ///
    /// # Errors
    /// read(2), but for `EAGAIN` and `EINTR`.
    pub fn read_events(&self) -> io::Result<Vec<UffdEvent>> {
        let mut buffer = [0u8; MESSAGE_BYTES * MAX_EVENTS_A_READ];
        // SAFETY: the buffer is as long as said.
        let read = unsafe { libc::read(self.fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
        let Ok(read) = usize::try_from(read) else {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(Vec::new()),
                _ => Err(error),
            };
        };
        Ok(buffer[..read].chunks_exact(MESSAGE_BYTES).map(parse).collect())
    }
}

/// `struct uffd_msg`.
fn parse(message: &[u8]) -> UffdEvent {
    let word = |at: usize| message.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_ne_bytes);
    let half = |at: usize| message.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes);
    match message[0] {
        0x12 => UffdEvent::Fault { at: Hva(word(16)), thread: half(24), minor: word(8) & PAGEFAULT_FLAG_MINOR != 0 },
        0x13 => match RawFd::try_from(half(8)) {
            // SAFETY: the kernel made the descriptor for the reader of the event, which is us.
            Ok(fd) => UffdEvent::Fork(ChildUffd(unsafe { OwnedFd::from_raw_fd(fd) })),
            Err(_) => UffdEvent::Unknown(0x13),
        },
        0x14 => UffdEvent::Remap { from: Hva(word(8)), to: Hva(word(16)), size: word(24) },
        0x15 => UffdEvent::Remove { start: Hva(word(8)), end: Hva(word(16)) },
        0x16 => UffdEvent::Unmap { start: Hva(word(8)), end: Hva(word(16)) },
        other => UffdEvent::Unknown(other),
    }
}

#[cfg(test)]
mod tests;
