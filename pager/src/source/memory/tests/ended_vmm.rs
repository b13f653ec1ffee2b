//! Reads of the memory of a VMM after its end.

use super::*;
use crate::sys::testing::ChildProcess;

/// A process with the same mapping, and a poison marker of its own on page 5. `None`: the kernel has no markers.
fn vmm(mapping: &TestMemory) -> Option<ChildProcess> {
    ChildProcess::after(|| mapping.poison(5).map(std::mem::forget).is_some())
}

fn memory(vmm: &ChildProcess, mapping: &TestMemory, file: &File) -> GuestMemory {
    let fd = file.try_clone().unwrap().into();
    memory_of(vmm.pid(), mapping.hva().0, Some(AttachedFile { fd, offset: 0 })).unwrap()
}

#[test]
fn a_memfd_is_served_with_its_markers_when_its_vmm_ended_after_they_were_copied() {
    let file = memfd();
    file.write_all_at(&[9; PAGES * PAGE], 0).unwrap();
    let mapping = TestMemory::of_file(&file, 0, BYTES);
    let Some(vmm) = vmm(&mapping) else { return };
    let memory = memory(&vmm, &mapping, &file);
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
    let mapping = TestMemory::of_file(&file, 0, BYTES);
    let Some(vmm) = vmm(&mapping) else { return };
    let memory = memory(&vmm, &mapping, &file);
    memory.copy_markers(|| true).unwrap();
    memory.stopped();
    drop(vmm);
    let copied = memory.copy_markers(|| true);
    assert!(matches!(copied, Err(ReadError::VmmGone { .. })), "{copied:?}");
    let found = memory.read(0, 4, 3, &mut [0; 3 * PAGE], &mut Runs::default());
    assert!(matches!(found, Err(ReadError::VmmGone { .. })), "{found:?}");
}
