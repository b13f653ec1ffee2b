use super::*;
use crate::layout::{Gpa, Region};

fn layout(pages: u64, gpa: u64) -> MemoryLayout {
    let region = Region { gpa: Gpa(gpa), size: pages << 12, page_size: 4096, backing: Backing::Anonymous };
    MemoryLayout::new(vec![region]).unwrap()
}

#[test]
fn bytes_survive_a_new_mapping() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pages");
    let (file, existed) = PageFile::open(&path, &layout(8, 0)).unwrap();
    assert!(!existed);
    file.states()[3].store(0x30, Ordering::Relaxed);
    file.word(Word::Faults).store(5, Ordering::Relaxed);
    drop(file);
    let (file, existed) = PageFile::open(&path, &layout(8, 0)).unwrap();
    assert!(existed);
    assert_eq!(file.states()[3].load(Ordering::Relaxed), 0x30);
    assert_eq!(file.word(Word::Faults).load(Ordering::Relaxed), 5);
}

#[test]
fn a_file_of_another_layout_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pages");
    PageFile::open(&path, &layout(8, 0)).unwrap();
    assert!(matches!(PageFile::open(&path, &layout(9, 0)), Err(PageFileError::Foreign { .. })));
    assert!(matches!(PageFile::open(&path, &layout(8, 4096)), Err(PageFileError::Foreign { .. })));
    std::fs::write(&path, vec![0; HEADER + 4]).unwrap();
    assert!(matches!(PageFile::open(&path, &layout(8, 0)), Err(PageFileError::Foreign { .. })));
}
