//! How a thread stands against the others for a core: a vCPU waits for the urgent path, nobody for the bulk path.

use std::io;

/// Nice value (sched(7)) of the threads between a fault and its resolution.
const URGENT: i32 = -15;
/// Their time slice, in nanoseconds: a thread that wants little and wants it soon is put before others when it wakes
/// (`sched_runtime` of a fair thread, Linux 6.12; earlier kernels do not look at it).
const URGENT_SLICE: u64 = 100_000;

/// `struct sched_attr` (sched_setattr(2)).
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

/// The calling thread serves faults. Without `CAP_SYS_NICE` (`EPERM`) it is not put before others: slower under load, not
/// wrong.
pub fn urgent() {
    apply(&Attributes { nice: URGENT, runtime: URGENT_SLICE, ..Attributes::default() });
}

/// The calling thread sends in bulk: it takes its share, but puts nobody aside when it wakes. Its nice value stays that of
/// the vCPUs: behind them it would starve, and the guest would have to ask for every page by itself.
pub fn bulk() {
    apply(&Attributes { policy: libc::SCHED_BATCH as u32, ..Attributes::default() });
}

/// Whoever waits for this core may go first. Bulk says so after every frame: a thread that has run for more than its share
/// puts nobody aside when it wakes, and a vCPU whose page has come would wait for the next tick of the clock, up to 4 ms.
/// So does a thread that spins: what it spins for may have to be done on its core, by a vCPU that it has just woken.
pub fn give_way() {
    std::thread::yield_now();
}

fn apply(attributes: &Attributes) {
    let attributes = Attributes { size: size_of::<Attributes>() as u32, ..*attributes };
    // SAFETY: a struct of the size that it says; 0 is the calling thread.
    if unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) } != 0 {
        tracing::debug!(error = %io::Error::last_os_error(), "thread.priority_kept");
    }
}

#[cfg(test)]
mod tests {
    /// Policy and nice value of the calling thread.
    fn standing() -> (i32, i32) {
        // SAFETY: no memory is passed.
        unsafe { (libc::sched_getscheduler(0), libc::getpriority(libc::PRIO_PROCESS, 0)) }
    }

    #[test]
    fn a_thread_stands_as_it_should_where_it_may_and_only_it() {
        let before = standing();
        let of = |enter: fn()| {
            let stand = move || {
                enter();
                standing()
            };
            std::thread::spawn(stand).join().unwrap()
        };
        let urgent = of(super::urgent);
        assert!(urgent == (libc::SCHED_OTHER, super::URGENT) || urgent == before, "{urgent:?}");
        assert_eq!(of(super::bulk).0, libc::SCHED_BATCH);
        assert_eq!(standing(), before);
    }
}
