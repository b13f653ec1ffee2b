//! The two signals that a vCPU thread lives with: the kick that makes it leave `KVM_RUN`, and the SIGBUS by which KVM
//! tells that the page the vCPU touched is poison.
//!
//! Both handlers find their vCPU by a thread-local pointer. A SIGBUS of any other thread, outside guest memory, or outside
//! `KVM_RUN` goes to the handler that was there before, or else ends the process as it would without us.

use std::cell::Cell;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::thread::JoinHandleExt;
use std::ptr::null;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::guest::mapped::gpa_of;
use crate::machine::MappedRegion;

/// What the handlers of a vCPU thread may use. Lives as long as its thread.
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

static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

impl Slot {
    /// For the vCPU whose `kvm_run` is mapped there.
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

    /// Makes the next `KVM_RUN` only finish what is pending.
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

/// Installs the handlers, once a process.
pub fn install_handlers() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let install = || {
        set_handler(kick_signal(), on_kick as *const () as usize).map(|_| ())?;
        let previous = set_handler(libc::SIGBUS, on_sigbus as *const () as usize)?;
        let _ = PREVIOUS.set(previous);
        Ok(())
    };
    INSTALLED
        .get_or_init(|| install().map_err(|error: io::Error| error.raw_os_error().unwrap_or(0)))
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

fn set_handler(signal: i32, handler: usize) -> io::Result<libc::sigaction> {
    let mut previous = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: all-zero is a sigaction; both pointers are to live ones of the right type; the handlers have the
    // signature that SA_SIGINFO asks for.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        if libc::sigaction(signal, &action, previous.as_mut_ptr()) < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(previous.assume_init())
    }
}

extern "C" fn on_kick(_signal: i32, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the pointer is null or to the slot of this very thread, which is installed.
    if let Some(slot) = unsafe { SLOT.get().as_ref() } {
        slot.immediate_exit().store(1, Ordering::SeqCst);
    }
}

extern "C" fn on_sigbus(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel hands a valid siginfo, and SIGBUS has an address.
    let hva = unsafe { (*info).si_addr() } as u64;
    // SAFETY: as in `on_kick`.
    if let Some(slot) = unsafe { SLOT.get().as_ref() }
        && slot.running.load(Ordering::SeqCst)
        && gpa_of(&slot.regions, hva).is_some()
    {
        slot.poisoned.store(hva, Ordering::SeqCst);
        return;
    }
    not_ours(signal, info, context, hva);
}

/// Says so, since whoever comes next may end the process in silence (as the standard library's handler does). Only
/// async-signal-safe calls.
fn not_ours(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void, hva: u64) {
    let mut text = *b"SIGBUS outside KVM_RUN of a vCPU, at 0x0000000000000000\n";
    let digits = text.len() - 17;
    for (n, digit) in text[digits..digits + 16].iter_mut().enumerate() {
        *digit = b"0123456789abcdef"[(hva >> (60 - 4 * n) & 0xf) as usize];
    }
    // SAFETY: write is async-signal-safe; the text outlives the call.
    unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
    let has_handler = |p: &&libc::sigaction| ![libc::SIG_DFL, libc::SIG_IGN].contains(&p.sa_sigaction);
    match PREVIOUS.get().filter(has_handler) {
        Some(previous) if previous.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: a handler installed with SA_SIGINFO has this signature.
            let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { std::mem::transmute(previous.sa_sigaction) };
            handler(signal, info, context);
        }
        Some(previous) => {
            // SAFETY: a handler installed without SA_SIGINFO has this signature.
            let handler: extern "C" fn(i32) = unsafe { std::mem::transmute(previous.sa_sigaction) };
            handler(signal);
        }
        // SAFETY: both calls are async-signal-safe.
        None => unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        },
    }
}
