//! How a thread stands against the others for a core: a vCPU waits for the urgent path, nobody for the bulk path.

/// Nice value (sched(7)) of the threads between a fault and its resolution.
const URGENT: i32 = -15;
/// Of a thread that only fills the link.
const BULK: i32 = 5;

/// The calling thread serves faults.
pub fn urgent() {
    set("urgent", URGENT);
}

/// The calling thread pushes.
pub fn bulk() {
    set("bulk", BULK);
}

/// Without `CAP_SYS_NICE` (setpriority(2): `EACCES`) the thread stays as it is: slower under load, not wrong.
fn set(kind: &str, nice: i32) {
    // SAFETY: no memory is passed; `0` is the calling thread.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) } != 0 {
        tracing::debug!(kind, error = %std::io::Error::last_os_error(), "thread.priority_kept");
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_bulk_thread_steps_back() {
        let nice = std::thread::spawn(|| {
            super::bulk();
            // SAFETY: no memory is passed.
            unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
        });
        assert_eq!(nice.join().unwrap(), super::BULK);
    }
}
