//! Two routines that read and write pages with frames that may be bad or gone. They return a failure; the process lives on.
//!
//! The kernel answers such an access with SIGBUS. The handler here makes the routine return [`Probe::Unreadable`] or `false`.
//! It passes every other SIGBUS to the handler that was there before. Only x86-64, as vmferry is.

use std::arch::global_asm;
use std::sync::OnceLock;

use crate::layout::PAGE_SIZE;
use crate::sys::memory_failure::BUS_MCEERR_AO;

/// The contents of a page, as far as they can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    Zeros,
    Contents,
    Unreadable,
}

// 64 bytes a round: most pages with contents have some in their first 64 bytes.
global_asm!(
    ".pushsection .text.vmferry_probe, \"ax\", @progbits",
    ".hidden vmferry_probe",
    ".globl vmferry_probe",
    ".hidden vmferry_probe_end",
    ".globl vmferry_probe_end",
    ".p2align 4",
    "vmferry_probe:",
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
    "vmferry_probe_end:",
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
    fn vmferry_probe(page: *const u8) -> u32;
    fn vmferry_probe_end();
    fn vmferry_copy(to: *mut u8, from: *const u8) -> u32;
    fn vmferry_copy_end();
}

/// The action for SIGBUS before [`prepare`].
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Installs the handler that [`probe_zero`] and [`copy`] rely on, once for the process.
pub(super) fn prepare() {
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
    let probe = (vmferry_probe as *const () as i64, vmferry_probe_end as *const () as i64);
    let copy = (vmferry_copy as *const () as i64, vmferry_copy_end as *const () as i64);
    for (start, end) in [probe, copy] {
        if (start..end).contains(rip) {
            *rip = end;
            return;
        }
    }
    // The fault is not ours. The access repeats it at once, and the action of before applies.
    // SAFETY: a zeroed sigaction is the default action; the other came from sigaction(2).
    unsafe {
        let before = BEFORE.get().copied().unwrap_or_else(|| std::mem::zeroed());
        libc::sigaction(libc::SIGBUS, &raw const before, std::ptr::null_mut());
    }
}

/// Finds whether a page is all zeros. The page may go bad or away at any time.
///
/// # Safety
/// `page` is aligned to 4 KiB, in a mapping that is readable or gives SIGBUS, and [`prepare`] was called.
#[inline]
pub(super) unsafe fn probe_zero(page: *const u8) -> Probe {
    // SAFETY: as the caller promises.
    match unsafe { vmferry_probe(page) } {
        0 => Probe::Zeros,
        1 => Probe::Contents,
        _ => Probe::Unreadable,
    }
}

/// Copies a page; returns whether all of it was copied. Either page may go bad or away at any time.
///
/// # Safety
/// `to` is a page that is writable or gives SIGBUS, and nobody else has a reference to it. `from` is a page that is readable
/// or gives SIGBUS. [`prepare`] was called.
#[inline]
#[must_use]
pub(super) unsafe fn copy(to: *mut u8, from: *const u8) -> bool {
    // SAFETY: as the caller promises.
    unsafe { vmferry_copy(to, from) == 0 }
}

#[cfg(test)]
mod tests;
