//! The userfaultfd ABI (linux/userfaultfd.h, `ioctl_userfaultfd(2)`), as far as a VMM needs it.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

const UFFD_API: u64 = 0xAA;
/// `_IO(0xAA, 0x00)` on /dev/userfaultfd.
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xAA00;
/// `_IOWR(0xAA, 0x3F, struct uffdio_api)`.
const UFFDIO_API: libc::c_ulong = 0xC018_AA3F;
/// `_IOWR(0xAA, 0x00, struct uffdio_register)`.
const UFFDIO_REGISTER: libc::c_ulong = 0xC020_AA00;
/// `_IOR(0xAA, 0x01, struct uffdio_range)`.
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_AA01;
/// `_IOWR(0xAA, 0x08, struct uffdio_poison)`, Linux 6.6.
const UFFDIO_POISON: libc::c_ulong = 0xC020_AA08;

/// Faults on pages that do not exist.
pub const MODE_MISSING: u64 = 1 << 0;
/// Faults on pages that exist in the file but are not mapped (memory of a memfd only).
pub const MODE_MINOR: u64 = 1 << 2;

/// Feature bits by their kernel names, without the `UFFD_FEATURE_` that each begins with.
const FEATURES: [&str; 17] = [
    "PAGEFAULT_FLAG_WP",
    "EVENT_FORK",
    "EVENT_REMAP",
    "EVENT_REMOVE",
    "MISSING_HUGETLBFS",
    "MISSING_SHMEM",
    "EVENT_UNMAP",
    "SIGBUS",
    "THREAD_ID",
    "MINOR_HUGETLBFS",
    "MINOR_SHMEM",
    "EXACT_ADDRESS",
    "WP_HUGETLBFS_SHMEM",
    "WP_UNPOPULATED",
    "POISON",
    "WP_ASYNC",
    "MOVE",
];

/// `UFFD_FEATURE_MINOR_HUGETLBFS`.
pub const FEATURE_MINOR_HUGETLBFS: u64 = 1 << 9;
/// `UFFD_FEATURE_MINOR_SHMEM`.
pub const FEATURE_MINOR_SHMEM: u64 = 1 << 10;
/// `UFFD_FEATURE_POISON`.
pub const FEATURE_POISON: u64 = 1 << 14;

/// The bit of a feature named as in linux/userfaultfd.h, e.g. `UFFD_FEATURE_POISON`.
pub fn feature_bit(name: &str) -> Option<u64> {
    let short = name.strip_prefix("UFFD_FEATURE_")?;
    FEATURES.iter().position(|known| *known == short).map(|bit| 1 << bit)
}

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioPoison {
    range: UffdioRange,
    mode: u64,
    updated: i64,
}

/// The outcome of [`Userfaultfd::poison`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoisonOutcome {
    /// The marker is in place.
    Marked,
    /// The page is present, or marked already.
    PagePresent,
    /// The address space is changing; ask again.
    Again,
}

/// A userfaultfd over this process's memory.
#[derive(Debug)]
pub struct Userfaultfd {
    fd: OwnedFd,
    features: u64,
}

impl Userfaultfd {
    /// Makes one that also sees faults of the kernel (KVM), non-blocking, with `features` agreed.
    ///
    /// # Errors
    /// EPERM: neither /dev/userfaultfd nor the system call is allowed. EINVAL: the kernel lacks a feature.
    pub fn new(features: u64) -> io::Result<Self> {
        let fd = open()?;
        let mut api = UffdioApi { api: UFFD_API, features, ioctls: 0 };
        ioctl(fd.as_raw_fd(), UFFDIO_API, &mut api)?;
        Ok(Self { fd, features: api.features })
    }

    /// Bits of all features that this kernel has.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn kernel_features() -> io::Result<u64> {
        Ok(Self::new(0)?.features)
    }

    /// The descriptor, to be handed to the pager.
    pub fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Registers `[start, start + len)`.
    ///
    /// # Errors
    /// EBUSY: another userfaultfd has it.
    pub fn register(&self, start: u64, len: u64, mode: u64) -> io::Result<()> {
        let mut register = UffdioRegister { range: UffdioRange { start, len }, mode, ioctls: 0 };
        ioctl(self.as_raw_fd(), UFFDIO_REGISTER, &mut register)
    }

    /// Unregisters `[start, start + len)`, and wakes the threads that wait there. Poison markers stay.
    ///
    /// # Errors
    /// As the ioctl.
    pub fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        ioctl(self.as_raw_fd(), UFFDIO_UNREGISTER, &mut UffdioRange { start, len })
    }

    /// Puts a poison marker where no page is present, and wakes the threads that wait there.
    ///
    /// # Errors
    /// ENOENT: not registered.
    pub fn poison(&self, start: u64, len: u64) -> io::Result<PoisonOutcome> {
        let mut poison = UffdioPoison { range: UffdioRange { start, len }, mode: 0, updated: 0 };
        match ioctl(self.as_raw_fd(), UFFDIO_POISON, &mut poison) {
            Ok(()) => Ok(PoisonOutcome::Marked),
            Err(error) => match error.raw_os_error() {
                Some(libc::EEXIST) => Ok(PoisonOutcome::PagePresent),
                Some(libc::EAGAIN) => Ok(PoisonOutcome::Again),
                _ => Err(error),
            },
        }
    }
}

fn open() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let fd = match OpenOptions::new().read(true).write(true).open("/dev/userfaultfd") {
        // SAFETY: this ioctl takes its flags by value and returns a new descriptor.
        Ok(device) => unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) },
        // SAFETY: the system call takes its flags by value and returns a new descriptor.
        Err(_) => unsafe { libc::syscall(libc::SYS_userfaultfd, flags) as RawFd },
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and is owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `T` must be the structure that the request reads and writes.
fn ioctl<T>(fd: RawFd, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: every caller in this module passes the structure that belongs to the request; it outlives the call.
    if unsafe { libc::ioctl(fd, request, std::ptr::from_mut(argument)) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
