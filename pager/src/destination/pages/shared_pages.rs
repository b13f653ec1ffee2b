//! The pages of a destination, shared by the fault thread and the bulk threads.
//!
//! ```text
//!  fault and bulk threads ──▶ lock: claim ──▶ receive, install ──▶ lock: settle
//!  fault thread           ──▶ lock: fault, command
//! ```
//!
//! The lock is never held during a receive or an install ioctl, because the fault thread may need it to serve a vCPU. A lane
//! first marks its pages INSTALLING. No other thread then requests or installs them. REMOVE events and new poison wait until
//! all installs have finished. Otherwise a discarded page would be refilled, or COPY would overwrite a poison marker.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use crate::destination::memory::claim::Claim;
use crate::destination::pages::resolver::Resolver;
use crate::layout::page_run::{PageRun, PoisonInfo};
use crate::sys::userfaultfd::Stop;

/// The pages. A thread that needs both takes [`SharedPages::install_guard`] first.
#[derive(Debug)]
pub struct SharedPages {
    resolver: Mutex<Resolver>,
    receive_mapping: RwLock<()>,
    faults: AtomicU64,
    /// That faulted last.
    thread: AtomicU32,
    /// Nanoseconds.
    worked: AtomicU64,
    heavy: AtomicBool,
}

impl SharedPages {
    /// Of this resolver.
    pub fn new(resolver: Resolver) -> Self {
        Self {
            resolver: Mutex::new(resolver),
            receive_mapping: RwLock::new(()),
            faults: AtomicU64::new(0),
            thread: AtomicU32::new(0),
            worked: AtomicU64::new(0),
            heavy: AtomicBool::new(false),
        }
    }

    /// To be held for a moment only: a vCPU may wait for it.
    pub fn lock(&self) -> MutexGuard<'_, Resolver> {
        self.resolver.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Held from the claim of a frame's pages until it is settled.
    pub fn install_guard(&self) -> RwLockReadGuard<'_, ()> {
        self.receive_mapping.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something while no frame is on its way into memory.
    pub fn with_no_install_in_flight<T>(&self, what: impl FnOnce(&mut Resolver) -> T) -> T {
        let _nothing = self.receive_mapping.write().unwrap_or_else(PoisonError::into_inner);
        what(&mut self.lock())
    }

    /// Installs the pages of a claim that have come, with the `contents` of all its pages unless they were received in place.
    /// No more of the claim will come. The caller does not hold the lock.
    pub fn install(&self, claim: &mut Claim, contents: &[u8]) -> Option<Stop> {
        let written = claim.write(contents);
        if claim.is_by_file() {
            self.lock().mark_arrived(claim);
        }
        let installed = claim.install(contents);
        self.finish(claim);
        written.or(installed)
    }

    fn finish(&self, claim: &Claim) {
        let mut resolver = self.lock();
        for page in claim.lost() {
            // Where the marker cannot be placed now, the next fault places it.
            let _ = resolver.lose(page);
        }
        resolver.finish_claim(claim);
    }

    /// Bad pages came. After a stop, to be called again.
    pub fn poison(&self, pages: PageRun, note: PoisonInfo) -> Option<Stop> {
        let mut resolver = self.lock();
        if resolver.is_claimed(pages) {
            drop(resolver);
            return self.with_no_install_in_flight(|resolver| resolver.poison(pages, note));
        }
        resolver.poison(pages, note)
    }

    /// The guest has faulted, by this thread of the VMM; 0: not known.
    pub fn note_fault(&self, thread: u32) {
        self.faults.fetch_add(1, Ordering::Relaxed);
        self.thread.store(thread, Ordering::Relaxed);
    }

    /// The thread of the VMM that faulted last; 0: not known.
    pub fn faulting_thread(&self) -> u32 {
        self.thread.load(Ordering::Relaxed)
    }

    /// A number that changes with each fault.
    pub fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }

    /// A lane of the push has worked for so long.
    pub fn note_work(&self, time: Duration) {
        self.worked.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    /// How long lanes of the push have worked, all together.
    pub fn worked(&self) -> Duration {
        Duration::from_nanos(self.worked.load(Ordering::Relaxed))
    }

    /// The fault thread's judgement of the push ([`crate::sched::push_load`]).
    pub fn set_heavy(&self, heavy: bool) {
        self.heavy.store(heavy, Ordering::Relaxed);
    }

    /// Whether there is a push, and it is heavy.
    pub fn is_heavy(&self) -> bool {
        self.heavy.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests;
