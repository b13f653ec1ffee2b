//! The first load of a touch, which may raise SIGBUS: an instruction at a known address, and a handler that resumes
//! behind it.

use std::io;

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

/// What a load found.
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
/// `address` is mapped, and [`catch_sigbus`] was called.
pub unsafe fn probe(address: u64) -> Probed {
    // SAFETY: the caller's promise; a SIGBUS returns 1 by way of the handler.
    match unsafe { vmferry_refvm_probe(address) } {
        0 => Probed::Fine,
        _ => Probed::Poisoned,
    }
}

/// Makes [`probe`] survive memory errors. SIGBUS anywhere else still ends the process.
///
/// # Errors
/// As `sigaction(2)`.
pub fn catch_sigbus() -> io::Result<()> {
    // SAFETY: an all-zero sigaction is a value; the handler has the form that SA_SIGINFO asks for.
    let installed = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut())
    };
    if installed != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Only async-signal-safe calls and plain stores.
extern "C" fn on_sigbus(_signal: libc::c_int, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel hands an SA_SIGINFO handler the interrupted context.
    let rip = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize] };
    if *rip == vmferry_refvm_probe as *const () as i64 {
        *rip = vmferry_refvm_probe_fixup as *const () as i64;
        return;
    }
    // SAFETY: async-signal-safe; on return the access is made again and ends the process with the right signal.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inject;
    use crate::layout::{Backing, split};
    use crate::machine::{Block, KERNEL_BYTES};
    use crate::memory::GuestMemory;

    /// Also pins what `inject` stands on: the marker outlives the userfaultfd, in both backings, and neighbours are kept.
    #[test]
    fn an_injected_error_is_caught_and_its_neighbours_are_not() {
        catch_sigbus().unwrap();
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let memory = GuestMemory::new(&split(64 << 20, 1, backing).unwrap()).unwrap();
            let page = memory.regions()[0].hva + KERNEL_BYTES;
            for at in [page - 4096, page, page + 4096] {
                // SAFETY: inside the region.
                unsafe { (at as *mut u64).write_volatile(at) };
            }
            let shared = backing == Backing::Memfd;
            let bad = inject::Page { block: Block::page(KERNEL_BYTES), hva: page, shared };
            if let Err(error) = inject::memory_error(bad, None) {
                eprintln!("skipped: {error}");
                return;
            }
            inject::memory_error(bad, None).unwrap();
            for _ in 0..3 {
                // SAFETY: mapped, and the handler is installed.
                let found = unsafe { [probe(page - 4096), probe(page), probe(page + 4096)] };
                assert_eq!(found, [Probed::Fine, Probed::Poisoned, Probed::Fine], "{backing:?}");
            }
            // SAFETY: inside the region.
            assert_eq!(unsafe { ((page + 4096) as *const u64).read_volatile() }, page + 4096);
        }
    }
}
