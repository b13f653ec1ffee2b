//! sched_setattr(2) for the calling thread.

use std::io;

/// Threads that are started later do not inherit the class of this one (`SCHED_FLAG_RESET_ON_FORK`).
const RESET_ON_FORK: u64 = 1;

/// A scheduling class (sched(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SchedulingClass {
    /// `SCHED_OTHER` with a nice value and a time slice in nanoseconds; not inherited.
    Fair {
        /// The nice value.
        nice: i32,
        /// The time slice (`sched_runtime`); kernels before 6.12 ignore it.
        slice_ns: u64,
    },
    /// `SCHED_BATCH`.
    Batch,
    /// `SCHED_RR` with a priority; not inherited.
    RealTime {
        /// The priority.
        priority: u32,
    },
}

/// `struct sched_attr`.
#[repr(C)]
#[derive(Debug, Default)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
    util_min: u32,
    util_max: u32,
}

/// Puts the calling thread into a class.
///
/// # Errors
/// sched_setattr(2): `EPERM` without `CAP_SYS_NICE`.
pub fn enter(class: SchedulingClass) -> io::Result<()> {
    let size = size_of::<Attributes>() as u32;
    let attributes = match class {
        SchedulingClass::Fair { nice, slice_ns: runtime } => {
            Attributes { size, flags: RESET_ON_FORK, nice, runtime, ..Attributes::default() }
        }
        SchedulingClass::Batch => Attributes { size, policy: libc::SCHED_BATCH as u32, ..Attributes::default() },
        SchedulingClass::RealTime { priority } => {
            Attributes { size, policy: libc::SCHED_RR as u32, flags: RESET_ON_FORK, priority, ..Attributes::default() }
        }
    };
    // SAFETY: a struct of the size that it says; 0 is the calling thread.
    match unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Policy, without its flags, and nice value of the calling thread.
#[cfg(test)]
pub(crate) fn current() -> (i32, i32) {
    // SAFETY: no memory is passed.
    unsafe { (libc::sched_getscheduler(0) & !libc::SCHED_RESET_ON_FORK, libc::getpriority(libc::PRIO_PROCESS, 0)) }
}
