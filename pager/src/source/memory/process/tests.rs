//! The memory of a process, and not of the next one of its id.

use crate::layout::{Backing, Gpa, MemoryLayout, Region};
use crate::source::memory::tests::{BYTES, PAGE, PAGES, read};
use crate::source::memory::{GuestMemory, ReadError, Runs};
use crate::sys::testing::{ChildProcess, TestMemory};
use crate::vmm::attached_memory::{AttachedMemory, AttachedRegion};

#[test]
fn process_of_the_same_id_is_not_the_vmm() {
    let mapping = TestMemory::out_of_the_way(BYTES);
    mapping.fill(0, 7);
    let first = ChildProcess::idle();
    let pid = first.pid();
    let region = Region { gpa: Gpa(0), size: BYTES, page_size: PAGE as u64, backing: Backing::Anonymous };
    let memory = GuestMemory::new(AttachedMemory {
        vmm_pid: pid,
        layout: MemoryLayout::new(vec![region]).unwrap(),
        regions: vec![AttachedRegion { hva: mapping.hva(), file: None, uffd: None }],
        uffds: Vec::new(),
        collapse: false,
    })
    .unwrap();
    assert_eq!(read(&memory, 0, 1).1, [7]);
    drop(first);
    mapping.fill(0, 9);
    // ns_last_pid (proc(5)): the next process gets the id behind it, if nobody else is faster.
    let second = (0..50).find_map(|_| {
        std::fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).ok()?;
        Some(ChildProcess::idle()).filter(|child| child.pid() == pid)
    });
    let Some(_second) = second else { return println!("skipped: the id of a process cannot be had again") };
    let mut buffer = vec![0; PAGES * PAGE];
    for count in [1, PAGES as u64] {
        let outcome = memory.read(0, 0, count, &mut buffer, &mut Runs::default());
        assert!(matches!(outcome, Err(ReadError::VmmGone { .. })), "{outcome:?}");
    }
}
