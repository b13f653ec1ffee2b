use std::fs::File;
use std::os::unix::fs::FileExt;

use super::*;
use crate::sys::memfd::memfd;

fn file(pages: u64) -> File {
    memfd("guest", pages * PAGE_SIZE).unwrap().into()
}

#[test]
fn only_pages_of_the_mapping_can_be_had() {
    let mapping = PageMapping::readable(&file(4), PAGE_SIZE, 3 * PAGE_SIZE).unwrap();
    assert_eq!(mapping.count(), 3);
    for (first, count, is_inside) in [
        (0, 3, true),
        (2, 1, true),
        (3, 0, true),
        (2, 2, false),
        (4, 0, false),
        (1, u64::MAX, false),
        (u64::MAX, 1, false),
    ] {
        assert_eq!(mapping.pages(first, count).is_some(), is_inside, "{first} + {count}");
    }
}

#[test]
#[should_panic(expected = "1 + 2 of 2 pages")]
fn a_part_is_inside_its_run() {
    let mapping = PageMapping::readable(&file(4), 0, 4 * PAGE_SIZE).unwrap();
    mapping.pages(1, 2).unwrap().part(1, 2);
}

#[test]
fn pages_are_written_and_read_back_until_the_file_ends() {
    let file = file(4);
    let mapping = PageMapping::writable(&file, PAGE_SIZE, 3 * PAGE_SIZE).unwrap();
    let pages = mapping.pages(0, 3).unwrap();
    let contents = [[7; PAGE], [8; PAGE]].concat();
    assert!(pages.part(1, 2).write(&contents));
    let mut found = vec![0; 2 * PAGE];
    file.read_exact_at(&mut found, 2 * PAGE_SIZE).unwrap();
    assert_eq!(found, contents);
    assert_eq!([0, 1, 2].map(|number| pages.probe(number)), [Probe::Zeros, Probe::Contents, Probe::Contents]);
    assert!(!pages.part(2, 1).write(&contents), "more than the run has");
    file.set_len(3 * PAGE_SIZE).unwrap();
    assert!(!pages.part(1, 2).write(&contents));
    assert!(!pages.part(1, 2).read(&mut found));
    assert!(pages.part(1, 1).read(&mut found[..PAGE]));
    assert_eq!(pages.probe(2), Probe::Unreadable);
}

#[test]
fn a_read_only_mapping_is_not_written() {
    let mapping = PageMapping::readable(&file(1), 0, PAGE_SIZE).unwrap();
    assert!(!mapping.pages(0, 1).unwrap().write(&[1; PAGE]));
}

#[test]
fn pages_that_the_file_lacks_are_looked_up() {
    let file = file(4);
    file.write_all_at(&[1], 2 * PAGE_SIZE).unwrap();
    let mapping = PageMapping::readable(&file, 0, 4 * PAGE_SIZE).unwrap();
    let mut resident = [9; 4];
    mapping.pages(0, 4).unwrap().look_up(&mut resident);
    assert_eq!(resident.map(|page| page & 1), [0, 0, 1, 0]);
}

#[test]
fn huge_pages_of_the_file_are_aligned_in_a_writable_mapping() {
    for offset in [0, PAGE_SIZE, HUGE_PAGE_SIZE - PAGE_SIZE] {
        let mapping = PageMapping::writable(&file(2048), offset, 4 * HUGE_PAGE_SIZE - offset).unwrap();
        assert_eq!(mapping.start as u64 % HUGE_PAGE_SIZE, offset % HUGE_PAGE_SIZE);
    }
}
