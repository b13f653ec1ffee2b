//! The one handler of SIGBUS, the signal by which the kernel reports memory errors.
//!
//! | signal | meaning | the handler |
//! |---|---|---|
//! | `BUS_MCEERR_AO` in the main thread | the host found a bad frame that no thread touched | passes it to [`report_early_errors`] |
//! | of the thread that calls `MADV_HWPOISON` | [`crate::inject`] poisons that page | returns |
//! | of a vCPU in its guest's memory | the vCPU consumed the error | returns; the vCPU takes its machine check |
//! | any other | a defect, or an error outside guest memory | prints a message, then leaves it to the handler before |
//!
//! Handlers call async-signal-safe functions only.

use std::io::{self, PipeWriter, Read};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;

use crate::inject;

/// `si_code` of an error that was found early (linux/siginfo.h).
const BUS_MCEERR_AO: i32 = 5;
/// prctl(2).
const PR_MCE_KILL: i32 = 33;
const PR_MCE_KILL_SET: u64 = 1;
const PR_MCE_KILL_EARLY: u64 = 1;

/// Whether an accelerator takes a SIGBUS at this HVA, with the interrupted context that the kernel hands an SA_SIGINFO
/// handler. Async-signal-safe.
pub type Takes = unsafe fn(u64, *mut libc::c_void) -> bool;

/// The accelerators, each with its own way to take a SIGBUS.
#[derive(Debug, Clone, Copy)]
pub enum Accelerator {
    /// vCPUs of KVM.
    Kvm,
    /// vCPUs that are threads of this process.
    Process,
}

static TAKERS: [OnceLock<Takes>; 2] = [const { OnceLock::new() }; 2];
/// The handler before ours: the standard library's.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();
/// Takes the HVA of each early error, 8 bytes.
static EARLY: OnceLock<PipeWriter> = OnceLock::new();

/// From now on `takes` is asked of each SIGBUS.
///
/// # Errors
/// As `sigaction(2)`.
pub fn install(accelerator: Accelerator, takes: Takes) -> io::Result<()> {
    TAKERS[accelerator as usize].get_or_init(|| takes);
    install_handler()
}

/// Once a process.
fn install_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let install = || {
        let previous = set_handler(libc::SIGBUS, on_sigbus as *const () as usize)?;
        let _ = PREVIOUS.set(previous);
        Ok(())
    };
    INSTALLED
        .get_or_init(|| install().map_err(|error: io::Error| error.raw_os_error().unwrap_or(0)))
        .map_err(io::Error::from_raw_os_error)
}

/// Makes `handler` that of `signal`; returns the one before.
pub(crate) fn set_handler(signal: i32, handler: usize) -> io::Result<libc::sigaction> {
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

/// Has the kernel signal errors of this process's memory when it finds them, not only when a thread touches them; `report`
/// gets the HVA of each, in a thread of its own. Called once, by the main thread, before there is any other thread: the
/// policy belongs to a thread, and threads inherit it.
///
/// # Errors
/// No pipe, no thread, or no handler.
pub fn report_early_errors(mut report: impl FnMut(u64) + Send + 'static) -> io::Result<()> {
    let (mut reader, writer) = io::pipe()?;
    let _ = EARLY.set(writer);
    install_handler()?;
    // SAFETY: numbers only. EINVAL from a kernel without CONFIG_MEMORY_FAILURE, which has no errors to tell of.
    unsafe { libc::prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0) };
    let body = move || {
        let mut hva = [0; 8];
        while reader.read_exact(&mut hva).is_ok() {
            report(u64::from_ne_bytes(hva));
        }
    };
    std::thread::Builder::new().name("early-errors".into()).spawn(body).map(drop)
}

extern "C" fn on_sigbus(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel hands a valid siginfo, and SIGBUS has an address.
    let (code, hva) = unsafe { ((*info).si_code, (*info).si_addr() as u64) };
    let known = (code == BUS_MCEERR_AO && pass_on(hva))
        || inject::raised_by_us(hva)
        // SAFETY: the kernel hands an SA_SIGINFO handler the interrupted context.
        || TAKERS.iter().filter_map(OnceLock::get).any(|takes| unsafe { takes(hva, context) });
    if !known {
        not_ours(signal, info, context, hva);
    }
}

/// Nobody asked for early errors: false.
fn pass_on(hva: u64) -> bool {
    let Some(writer) = EARLY.get() else { return false };
    let bytes = hva.to_ne_bytes();
    // SAFETY: eight bytes, which a pipe takes whole or not at all. A full pipe is being read.
    unsafe { libc::write(writer.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) };
    true
}

/// Prints a message, because the handler before may end the process in silence, as the standard library's does.
fn not_ours(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void, hva: u64) {
    let mut text = *b"SIGBUS outside the guest's accesses, at 0x0000000000000000\n";
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
