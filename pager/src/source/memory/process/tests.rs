//! The memory of a process, and not of the next one of its id.

use crate::layout::{Backing, Gpa, Hva, MemoryLayout, Region};
use crate::source::memory::tests::{Mapping, PAGE, PAGES, read};
use crate::source::memory::{GuestMemory, ReadError, Runs};
use crate::vmm::attached_memory::{AttachedMemory, AttachedRegion};

/// A child that does nothing, with this process's memory.
fn idle_child() -> libc::pid_t {
    // SAFETY: the child calls only pause(2).
    match unsafe { libc::fork() } {
        0 => loop {
            // SAFETY: waits for a signal.
            unsafe { libc::pause() };
        },
        pid => pid,
    }
}

fn end(pid: libc::pid_t) {
    // SAFETY: our own child.
    unsafe {
        libc::kill(pid, libc::SIGKILL);
        libc::waitpid(pid, std::ptr::null_mut(), 0);
    }
}

#[test]
fn process_of_the_same_id_is_not_the_vmm() {
    let mapping = Mapping::out_of_the_way();
    mapping.write(0, 7);
    let first = idle_child();
    let region =
        Region { gpa: Gpa(0), size: (PAGES * PAGE) as u64, page_size: PAGE as u64, backing: Backing::Anonymous };
    let memory = GuestMemory::new(AttachedMemory {
        vmm_pid: first as u32,
        layout: MemoryLayout::new(vec![region]).unwrap(),
        regions: vec![AttachedRegion { hva: Hva(mapping.at), file: None, uffd: None }],
        uffds: Vec::new(),
        collapse: false,
    })
    .unwrap();
    assert_eq!(read(&memory, 0, 1).1, [7]);
    end(first);
    mapping.write(0, 9);
    // ns_last_pid (proc(5)): the next process gets the id behind it, if nobody else is faster.
    let second = (0..50).find_map(|_| {
        std::fs::write("/proc/sys/kernel/ns_last_pid", (first - 1).to_string()).ok()?;
        let child = idle_child();
        if child == first {
            return Some(child);
        }
        end(child);
        None
    });
    let Some(second) = second else { return println!("skipped: the id of a process cannot be had again") };
    let mut buffer = vec![0; PAGES * PAGE];
    for count in [1, PAGES as u64] {
        let outcome = memory.read(0, 0, count, &mut buffer, &mut Runs::default());
        assert!(matches!(outcome, Err(ReadError::VmmGone { .. })), "{outcome:?}");
    }
    end(second);
}
