//! How a thread stands against the others for a core: a vCPU waits for the urgent path, nobody for the bulk path.

/// Nice value (sched(7)) of the threads between a fault and its resolution.
const URGENT: i32 = -15;

/// The calling thread serves faults. Bulk lanes stay where the vCPUs are: behind them they would starve, and the guest
/// would have to ask for every page by itself.
///
/// Without `CAP_SYS_NICE` (setpriority(2): `EACCES`) the thread stays as it is: slower under load, not wrong.
pub fn urgent() {
    // SAFETY: no memory is passed; `0` is the calling thread.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, URGENT) } != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "thread.priority_kept");
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn an_urgent_thread_goes_first_where_it_may() {
        let nice = || {
            // SAFETY: no memory is passed.
            unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
        };
        let before = nice();
        let after = std::thread::spawn(move || {
            super::urgent();
            nice()
        });
        let after = after.join().unwrap();
        assert!(after == super::URGENT || after == before, "{after}");
        assert_eq!(nice(), before, "only the thread that asked");
    }
}
