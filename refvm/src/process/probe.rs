//! The first load of a touch, which may raise SIGBUS: an instruction at a known address, behind which
//! [`crate::sigbus`] resumes.

use std::arch::global_asm;

global_asm!(
    ".text",
    ".globl vmferry_refvm_probe",
    ".hidden vmferry_refvm_probe",
    "vmferry_refvm_probe:",
    "    mov rax, [rdi]",
    "    xor eax, eax",
    "    ret",
    ".globl vmferry_refvm_probe_fixup",
    ".hidden vmferry_refvm_probe_fixup",
    "vmferry_refvm_probe_fixup:",
    "    mov eax, 1",
    "    ret",
);

unsafe extern "C" {
    fn vmferry_refvm_probe(address: u64) -> u32;
    fn vmferry_refvm_probe_fixup();
}

/// The result of a load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probed {
    /// The page can be read.
    Fine,
    /// A memory error.
    Poisoned,
}

/// Loads from `address`; waits as long as a page fault there does.
///
/// # Safety
/// `address` is mapped, and [`crate::sigbus::install`] was called.
pub unsafe fn probe(address: u64) -> Probed {
    // SAFETY: the caller's promise; a SIGBUS returns 1 by way of the handler.
    match unsafe { vmferry_refvm_probe(address) } {
        0 => Probed::Fine,
        _ => Probed::Poisoned,
    }
}

/// Whether a SIGBUS is [`probe`]'s own; its thread then continues behind the load. Async-signal-safe.
///
/// # Safety
/// `context` is that of a handler with `SA_SIGINFO`.
pub(crate) unsafe fn takes_sigbus(_hva: u64, context: *mut libc::c_void) -> bool {
    // SAFETY: the caller's promise.
    let rip = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize] };
    let ours = *rip == vmferry_refvm_probe as *const () as i64;
    if ours {
        *rip = vmferry_refvm_probe_fixup as *const () as i64;
    }
    ours
}

#[cfg(test)]
mod tests;
