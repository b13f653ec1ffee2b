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
