//! The two signals that a vCPU thread lives with: the kick that makes it leave `KVM_RUN`, and the SIGBUS of KVM for a
//! vCPU that touched poison.
//!
//! Both handlers find their vCPU by a thread-local pointer. The handler of SIGBUS itself is [`crate::sigbus`].

use std::cell::Cell;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::ptr::null;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::guest::mapped::gpa_of;
use crate::machine::MappedRegion;
use crate::sigbus::set_handler;

/// The data that handlers of a vCPU thread may use. Lives as long as its thread.
pub struct Slot {
    /// `kvm_run.immediate_exit` of the vCPU.
    immediate_exit: *const AtomicU8,
    /// Whether the thread is in `KVM_RUN`.
    running: AtomicBool,
    /// HVA of the last SIGBUS that was for us; 0: none.
    poisoned: AtomicU64,
    regions: Arc<[MappedRegion]>,
}

thread_local! {
    static SLOT: Cell<*const Slot> = const { Cell::new(null()) };
}

impl Slot {
    /// For the vCPU with its `kvm_run` mapped there.
    ///
    /// # Safety
    /// `immediate_exit` stays valid as long as the slot.
    pub unsafe fn new(immediate_exit: *mut u8, regions: Arc<[MappedRegion]>) -> Box<Self> {
        Box::new(Self {
            immediate_exit: immediate_exit.cast(),
            running: AtomicBool::new(false),
            poisoned: AtomicU64::new(0),
            regions,
        })
    }

    /// Makes it this thread's slot, until the guard is dropped.
    pub fn install(&self) -> Installed<'_> {
        SLOT.set(self);
        Installed(self)
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: valid by the promise given to `new`; one byte, which the kernel only reads.
        unsafe { &*self.immediate_exit }
    }
}

/// A slot that is its thread's.
pub struct Installed<'a>(&'a Slot);

impl Installed<'_> {
    /// Makes the next `KVM_RUN` run, unless a kick comes in between.
    pub fn arm(&self) {
        self.0.immediate_exit().store(0, Ordering::SeqCst);
    }

    /// Makes the next `KVM_RUN` only finish the pending exit.
    pub fn finish_only(&self) {
        self.0.immediate_exit().store(1, Ordering::SeqCst);
    }

    /// Brackets a `KVM_RUN`: only within is a SIGBUS ours.
    pub fn running(&self, running: bool) {
        self.0.running.store(running, Ordering::SeqCst);
    }

    /// The HVA that a SIGBUS named since the last call.
    pub fn take_poisoned(&self) -> Option<u64> {
        Some(self.0.poisoned.swap(0, Ordering::SeqCst)).filter(|hva| *hva != 0)
    }
}

impl Drop for Installed<'_> {
    fn drop(&mut self) {
        SLOT.set(null());
    }
}

/// A kick that a vCPU thread gives itself, later.
pub struct Alarm(libc::timer_t);

impl Alarm {
    /// For the calling thread.
    pub fn new() -> io::Result<Self> {
        let mut timer = std::ptr::null_mut();
        // SAFETY: all-zero is a sigevent; both pointers are to live ones of the right type.
        let result = unsafe {
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = kick_signal();
            event.sigev_notify_thread_id = libc::gettid();
            libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer)
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(Self(timer)) }
    }

    /// Once, after this time (below a second).
    pub fn ring_in(&self, time: Duration) {
        let at = libc::timespec { tv_sec: 0, tv_nsec: i64::from(time.subsec_nanos()) };
        let once = libc::itimerspec { it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 }, it_value: at };
        // SAFETY: the timer lives as long as `self`. It cannot fail: the values are in range.
        unsafe { libc::timer_settime(self.0, 0, &once, std::ptr::null_mut()) };
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: made by `new`, deleted once.
        unsafe { libc::timer_delete(self.0) };
    }
}

/// Installs the handler of the kick, once a process.
pub fn install_kick() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let install = || set_handler(kick_signal(), on_kick as *const () as usize).map(drop);
    INSTALLED
        .get_or_init(|| install().map_err(|error| error.raw_os_error().unwrap_or(0)))
        .map_err(io::Error::from_raw_os_error)
}

/// Makes a vCPU thread leave `KVM_RUN`, or not enter it.
pub fn kick(thread: &JoinHandle<()>) {
    // SAFETY: the thread has not been joined, so its handle is valid, even if it has ended.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
}

fn kick_signal() -> i32 {
    libc::SIGRTMIN() + 4
}

extern "C" fn on_kick(_signal: i32, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the pointer is null or to the slot of this very thread, which is installed.
    if let Some(slot) = unsafe { SLOT.get().as_ref() } {
        slot.immediate_exit().store(1, Ordering::SeqCst);
    }
}

/// Whether a SIGBUS of the calling thread is its vCPU's: in guest memory, during `KVM_RUN`. Async-signal-safe.
///
/// # Safety
/// As [`crate::sigbus::Takes`].
pub(crate) unsafe fn takes_sigbus(hva: u64, _context: *mut libc::c_void) -> bool {
    // SAFETY: as in `on_kick`.
    let Some(slot) = (unsafe { SLOT.get().as_ref() }) else { return false };
    let ours = slot.running.load(Ordering::SeqCst) && gpa_of(&slot.regions, hva).is_some();
    if ours {
        slot.poisoned.store(hva, Ordering::SeqCst);
    }
    ours
}
