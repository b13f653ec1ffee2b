//! Reads of the memory of a VMM after its end.

use super::*;

/// A process with the same mapping, and a poison marker of its own on page 5; killed when dropped.
struct Vmm {
    pid: libc::pid_t,
}

impl Vmm {
    /// `None`: the kernel has no markers, and why is printed.
    fn start(mapping: &Mapping) -> Option<Self> {
        let (mut ready, mut told) = io::pipe().unwrap();
        // SAFETY: the child makes system calls only, and never returns.
        match unsafe { libc::fork() } {
            // SAFETY: as above.
            0 => unsafe {
                let marked = mapping.poison(5);
                let _ = io::Write::write_all(&mut told, &[u8::from(marked.is_some())]);
                loop {
                    libc::pause();
                }
            },
            pid => {
                let (vmm, mut marked) = (Self { pid }, [0]);
                io::Read::read_exact(&mut ready, &mut marked).unwrap();
                (marked == [1]).then_some(vmm)
            }
        }
    }

    fn memory(&self, mapping: &Mapping, file: &File) -> GuestMemory {
        let fd = file.try_clone().unwrap().into();
        memory_of(self.pid as u32, mapping.at, Some(AttachedFile { fd, offset: 0 })).unwrap()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // SAFETY: a child of ours that nobody else waits for.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), 0);
        }
    }
}

#[test]
fn a_memfd_is_served_with_its_markers_when_its_vmm_ended_after_they_were_copied() {
    let file = memfd();
    file.write_all_at(&[9; PAGES * PAGE], 0).unwrap();
    let mapping = Mapping::new(Some(&file));
    let Some(vmm) = Vmm::start(&mapping) else { return };
    let memory = vmm.memory(&mapping, &file);
    memory.stopped();
    memory.copy_markers(|| true).unwrap();
    drop(vmm);
    let kinds = vec![Data(5), Poison(1), Data(10)];
    assert_eq!(read(&memory, 0, 16), (kinds, vec![9; 15]));
}

#[test]
fn a_memfd_whose_vmm_ended_before_its_markers_were_copied_is_not_served() {
    let file = memfd();
    file.write_all_at(&[9; PAGES * PAGE], 0).unwrap();
    let mapping = Mapping::new(Some(&file));
    let Some(vmm) = Vmm::start(&mapping) else { return };
    let memory = vmm.memory(&mapping, &file);
    memory.copy_markers(|| true).unwrap();
    memory.stopped();
    drop(vmm);
    let copied = memory.copy_markers(|| true);
    assert!(matches!(copied, Err(ReadError::VmmGone { .. })), "{copied:?}");
    let found = memory.read(0, 4, 3, &mut [0; 3 * PAGE], &mut Runs::default());
    assert!(matches!(found, Err(ReadError::VmmGone { .. })), "{found:?}");
}
