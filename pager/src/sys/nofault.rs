//! Reads and writes pages that may be bad, or gone: what cannot be done ends there, and not the process.
//!
//! The kernel answers such an access with SIGBUS, whose handler lets the two routines that may cause it return
//! ([`Probe::Unreadable`], `false`); any other SIGBUS goes to whoever handled it before. Only x86-64, as vmferry is.

use std::arch::global_asm;
use std::sync::OnceLock;

use crate::layout::PAGE_SIZE;
use crate::sys::memory_failure::BUS_MCEERR_AO;

/// What a page holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Probe {
    Zeros,
    Contents,
    Unreadable,
}

// 64 bytes a round: most pages that are not zeros say so in their first.
global_asm!(
    ".pushsection .text.vmferry_look, \"ax\", @progbits",
    ".hidden vmferry_look",
    ".globl vmferry_look",
    ".hidden vmferry_look_end",
    ".globl vmferry_look_end",
    ".p2align 4",
    "vmferry_look:",
    "    mov ecx, {rounds}",
    "    pxor xmm1, xmm1",
    "2:  movdqa xmm0, [rdi]",
    "    por xmm0, [rdi + 16]",
    "    por xmm0, [rdi + 32]",
    "    por xmm0, [rdi + 48]",
    "    pcmpeqb xmm0, xmm1",
    "    pmovmskb eax, xmm0",
    "    xor eax, 0xffff",
    "    jnz 3f",
    "    add rdi, 64",
    "    dec ecx",
    "    jnz 2b",
    "    ret",
    "3:  mov eax, 1",
    "    ret",
    "vmferry_look_end:",
    "    mov eax, 2",
    "    ret",
    ".popsection",
    rounds = const PAGE_SIZE / 64,
);

global_asm!(
    ".pushsection .text.vmferry_copy, \"ax\", @progbits",
    ".hidden vmferry_copy",
    ".globl vmferry_copy",
    ".hidden vmferry_copy_end",
    ".globl vmferry_copy_end",
    ".p2align 4",
    "vmferry_copy:",
    "    mov ecx, {page}",
    "    rep movsb",
    "    xor eax, eax",
    "    ret",
    "vmferry_copy_end:",
    "    mov eax, 1",
    "    ret",
    ".popsection",
    page = const PAGE_SIZE,
);

unsafe extern "C" {
    fn vmferry_look(page: *const u8) -> u32;
    fn vmferry_look_end();
    fn vmferry_copy(to: *mut u8, from: *const u8) -> u32;
    fn vmferry_copy_end();
}

/// Who handled SIGBUS before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Makes [`probe_zero`] and [`copy`] safe for this process; more than once is as good as once.
pub(crate) fn prepare() {
    BEFORE.get_or_init(|| {
        // SAFETY: zeroed sigactions are valid; the handler is of the kind that SA_SIGINFO says. The call cannot fail: SIGBUS
        // can be caught, and both structures are ours.
        unsafe {
            let (mut ours, mut before) = (std::mem::zeroed::<libc::sigaction>(), std::mem::zeroed());
            ours.sa_sigaction = on_sigbus as *const () as usize;
            ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
            libc::sigaction(libc::SIGBUS, &raw const ours, &raw mut before);
            before
        }
    });
}

extern "C" fn on_sigbus(_signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the second argument is a siginfo_t (sigaction(2)).
    if unsafe { (*info).si_code } == BUS_MCEERR_AO {
        return;
    }
    // SAFETY: with SA_SIGINFO the third argument is a ucontext_t (sigaction(2)), ours until we return.
    let rip = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize] };
    let look = (vmferry_look as *const () as i64, vmferry_look_end as *const () as i64);
    let copy = (vmferry_copy as *const () as i64, vmferry_copy_end as *const () as i64);
    for (start, end) in [look, copy] {
        if (start..end).contains(rip) {
            *rip = end;
            return;
        }
    }
    // Not ours: it comes again at once, and goes to whoever handled it before.
    // SAFETY: a zeroed sigaction is the default action; the other is what sigaction(2) gave.
    unsafe {
        let before = BEFORE.get().copied().unwrap_or_else(|| std::mem::zeroed());
        libc::sigaction(libc::SIGBUS, &raw const before, std::ptr::null_mut());
    }
}

/// Looks at a page that may go bad, or go away, at any time.
///
/// # Safety
/// `page` is aligned to 4 KiB, in a mapping that is readable or gives SIGBUS, and [`prepare`] was called.
pub(crate) unsafe fn probe_zero(page: *const u8) -> Probe {
    // SAFETY: as the caller promises.
    match unsafe { vmferry_look(page) } {
        0 => Probe::Zeros,
        1 => Probe::Contents,
        _ => Probe::Unreadable,
    }
}

/// Copies a page to where it may be impossible to write; whether all of it was.
///
/// # Safety
/// `to` is a page in a mapping that is writable or gives SIGBUS, of which nobody else has a reference; `from` is a page that
/// can be read; [`prepare`] was called.
#[must_use]
pub(crate) unsafe fn copy(to: *mut u8, from: *const u8) -> bool {
    // SAFETY: as the caller promises.
    unsafe { vmferry_copy(to, from) == 0 }
}

#[cfg(test)]
mod tests {
    use std::mem::MaybeUninit;

    use super::*;

    /// As the kernel sends it; a process may send itself any siginfo (rt_sigqueueinfo(2)).
    fn signal_early_error() {
        let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
        // SAFETY: the third word of a siginfo_t is its code; the call reads the structure.
        unsafe {
            info.as_mut_ptr().cast::<libc::c_int>().add(2).write(BUS_MCEERR_AO);
            let (process, thread) = (libc::getpid(), libc::gettid());
            let sent = libc::syscall(libc::SYS_rt_tgsigqueueinfo, process, thread, libc::SIGBUS, info.as_ptr());
            assert_eq!(sent, 0);
        }
    }

    #[test]
    fn an_early_error_leaves_the_handler_in_place() {
        prepare();
        for _ in 0..3 {
            signal_early_error();
        }
        // SAFETY: a fresh mapping of a file that is empty: each access is SIGBUS.
        let beyond = unsafe {
            let file = libc::memfd_create(c"empty".as_ptr(), libc::MFD_CLOEXEC);
            libc::mmap(std::ptr::null_mut(), PAGE_SIZE as usize, libc::PROT_READ, libc::MAP_SHARED, file, 0)
        };
        assert_ne!(beyond, libc::MAP_FAILED);
        // SAFETY: a page of the mapping; `prepare` was called.
        assert_eq!(unsafe { probe_zero(beyond.cast()) }, Probe::Unreadable);
    }
}
