//! The vDSO, vdso(7): each 64-bit process maps the same image, so ours tells where a `syscall` instruction is in others.

/// `syscall` on x86-64.
pub const SYSCALL_INSTRUCTION: [u8; 2] = [0x0f, 0x05];
/// Bytes of the image that are searched. It has more, but at least one page.
const SEARCHED_BYTES: usize = 4096;

/// The offset of a `syscall` instruction in the vDSO; `None`: this process has no vDSO, or no such instruction is there.
pub fn syscall_offset() -> Option<u64> {
    // SAFETY: getauxval only looks up a value.
    let base = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) } as *const u8;
    if base.is_null() {
        return None;
    }
    // SAFETY: the kernel maps at least one page there, readable, for the life of the process.
    let image = unsafe { std::slice::from_raw_parts(base, SEARCHED_BYTES) };
    image.windows(2).position(|window| window == SYSCALL_INSTRUCTION).map(|at| at as u64)
}
