//! Memory and processes for tests, so that no test needs unsafe code of its own.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::ptr::null_mut;

use crate::layout::{Hva, PAGE_SIZE};
use crate::sys::other_process;

const HUGE_PAGES: libc::c_int = libc::MAP_HUGETLB;

/// Memory of this process, which stands in for the memory of a VMM. Unmapped when dropped.
#[derive(Debug)]
pub struct TestMemory {
    hva: Hva,
    bytes: u64,
}

impl TestMemory {
    /// Maps memory without a file.
    pub fn anonymous(bytes: u64) -> Self {
        Self::map(0, bytes, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    }

    /// Maps memory at an address that the kernel does not choose by itself: once dropped, no other test has memory there.
    pub fn out_of_the_way(bytes: u64) -> Self {
        Self::map(1 << 37, bytes, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    }

    /// Takes huge pages out of the machine's pool.
    pub fn huge(bytes: u64) -> Self {
        Self::map(0, bytes, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | HUGE_PAGES | libc::MAP_POPULATE, -1, 0)
    }

    /// Maps a file from `offset` on.
    pub fn of_file(file: impl AsFd, offset: u64, bytes: u64) -> Self {
        Self::map(0, bytes, libc::MAP_SHARED | libc::MAP_NORESERVE, file.as_fd().as_raw_fd(), offset)
    }

    fn map(hint: u64, bytes: u64, flags: libc::c_int, fd: libc::c_int, offset: u64) -> Self {
        let both = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping; the address is a hint only.
        let at = unsafe { libc::mmap(hint as *mut _, bytes as usize, both, flags, fd, offset as libc::off_t) };
        assert_ne!(at, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Self { hva: Hva(at as u64), bytes }
    }

    /// Its first address.
    pub fn hva(&self) -> Hva {
        self.hva
    }

    /// The address of a byte.
    pub fn at(&self, offset: u64) -> u64 {
        assert!(offset < self.bytes);
        self.hva.0 + offset
    }

    /// Fills a page with a byte.
    pub fn fill(&self, page: u64, byte: u8) {
        // SAFETY: a page of the mapping, and nobody has a reference to it.
        unsafe { (self.at(page * PAGE_SIZE) as *mut u8).write_bytes(byte, PAGE_SIZE as usize) }
    }

    /// Loads a byte as a vCPU does: waits for a page that is absent.
    pub fn load(&self, offset: u64) -> u8 {
        // SAFETY: a byte of the mapping, and nobody has a reference to it.
        unsafe { (self.at(offset) as *const u8).read_volatile() }
    }

    /// Reads a byte by a system call, which waits for an absent page. `None`: the page is poison.
    pub fn byte(&self, offset: u64) -> Option<u8> {
        byte_at(self.at(offset))
    }

    /// Drops a page from the mapping.
    pub fn discard(&self, page: u64) {
        // SAFETY: a page of the mapping, and nobody has a reference to it.
        unsafe { libc::madvise(self.at(page * PAGE_SIZE) as *mut _, PAGE_SIZE as usize, libc::MADV_DONTNEED) };
    }

    /// As [`poison`].
    pub fn poison(&self, page: u64) -> Option<OwnedFd> {
        poison(self.hva.0, self.bytes / PAGE_SIZE, page)
    }
}

impl Drop for TestMemory {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, and nobody refers to it.
        unsafe { libc::munmap(self.hva.0 as *mut _, self.bytes as usize) };
    }
}

/// Reads a byte of this process by a system call, which waits for an absent page. `None`: the page is poison.
pub fn byte_at(at: u64) -> Option<u8> {
    let mut byte = [0];
    other_process::read(std::process::id(), Hva(at), &mut byte).is_ok().then_some(byte[0])
}

/// Puts a poison marker on a page of the `pages` that are mapped at `at`, by a userfaultfd that reports no fault. `None`: the
/// kernel refuses, and the reason is printed.
pub fn poison(at: u64, pages: u64, page: u64) -> Option<OwnedFd> {
    assert!(page < pages);
    let failed = |what: &str| {
        println!("skipped: {what}: {}", io::Error::last_os_error());
        None
    };
    let hva = at + page * PAGE_SIZE;
    // SAFETY: plain system calls on structures that live long enough. The kernel checks the range.
    unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC);
        if fd < 0 {
            return failed("userfaultfd");
        }
        let uffd = OwnedFd::from_raw_fd(fd as i32);
        let mut api: [u64; 3] = [0xaa, 1 << 14, 0];
        if libc::ioctl(uffd.as_raw_fd(), 0xc018_aa3f, &mut api) != 0 {
            return failed("UFFDIO_API with POISON");
        }
        let mut register: [u64; 4] = [at, pages * PAGE_SIZE, 2, 0];
        if libc::ioctl(uffd.as_raw_fd(), 0xc020_aa00, &mut register) != 0 {
            return failed("UFFDIO_REGISTER wp");
        }
        libc::madvise(hva as *mut libc::c_void, PAGE_SIZE as usize, libc::MADV_DONTNEED);
        let mut poison: [u64; 4] = [hva, PAGE_SIZE, 0, 0];
        if libc::ioctl(uffd.as_raw_fd(), 0xc020_aa08, &mut poison) != 0 {
            return failed("UFFDIO_POISON");
        }
        Some(uffd)
    }
}

/// Runs a task on a thread without `CAP_SYS_ADMIN`, as in the shipped unit (capabilities(7), `_LINUX_CAPABILITY_VERSION_3`).
pub fn without_cap_sys_admin<T: Send>(task: impl FnOnce() -> T + Send) -> T {
    const CAP_SYS_ADMIN: u32 = 21;
    let restricted = || {
        let (mut header, mut sets) = ([0x2008_0522u32, 0], [[0u32; 3]; 2]);
        // SAFETY: the header and both parts of the sets of this thread.
        unsafe {
            assert_eq!(libc::syscall(libc::SYS_capget, header.as_mut_ptr(), sets.as_mut_ptr()), 0);
            sets[0][0] &= !(1 << CAP_SYS_ADMIN);
            assert_eq!(libc::syscall(libc::SYS_capset, header.as_mut_ptr(), sets.as_ptr()), 0);
        }
        task()
    };
    std::thread::scope(|scope| scope.spawn(restricted).join().expect("the task ends"))
}

/// A process with a copy of this process's mappings, which waits until it is killed when dropped.
#[derive(Debug)]
pub struct ChildProcess {
    pid: libc::pid_t,
}

impl ChildProcess {
    /// Starts one that does nothing.
    pub fn idle() -> Self {
        Self::after(|| true).expect("the child says that it has begun")
    }

    /// Starts one that runs `first`, which makes system calls only. `None`: it returned false.
    pub fn after(first: impl FnOnce() -> bool) -> Option<Self> {
        let (mut ready, mut told) = io::pipe().expect("pipe(2)");
        // SAFETY: the child makes system calls only, and never returns.
        match unsafe { libc::fork() } {
            0 => {
                let _ = told.write_all(&[u8::from(first())]);
                loop {
                    // SAFETY: waits for a signal.
                    unsafe { libc::pause() };
                }
            }
            pid => {
                let (child, mut answer) = (Self { pid }, [0]);
                ready.read_exact(&mut answer).ok()?;
                (answer == [1]).then_some(child)
            }
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid as u32
    }
}

impl Drop for ChildProcess {
    fn drop(&mut self) {
        // SAFETY: a child of ours that nobody else waits for.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, null_mut(), 0);
        }
    }
}
