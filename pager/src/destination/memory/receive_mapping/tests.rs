use std::fs::File;
use std::os::unix::fs::FileExt;

use super::*;
use crate::sys::memfd::memfd;

fn file(pages: u64) -> AttachedFile {
    AttachedFile { fd: memfd("guest", (pages + 1) * PAGE_SIZE).unwrap(), offset: PAGE_SIZE }
}

#[test]
fn only_prepared_pages_are_ready() {
    let mut receive_mapping = ReceiveMapping::new(&file(16), 16 * PAGE_SIZE).unwrap();
    assert!(receive_mapping.ready(0, 1).is_none());
    receive_mapping.prepare(2, 2).unwrap();
    receive_mapping.prepare(4, 1).unwrap();
    receive_mapping.prepare(8, 1).unwrap();
    for (page, count, is_ready) in
        [(2, 3, true), (3, 2, true), (4, 1, true), (1, 2, false), (4, 2, false), (8, 1, true)]
    {
        assert_eq!(receive_mapping.ready(page, count).is_some(), is_ready, "{page}+{count}");
    }
    assert!(receive_mapping.ready(8, u64::MAX).is_none());
    assert!(receive_mapping.ready(u64::MAX, 1).is_none());
    assert!(receive_mapping.prepare(15, 2).is_err(), "outside");
    assert!(receive_mapping.prepare(7, 1).is_err(), "not behind");
}

#[test]
fn written_pages_are_in_the_file() {
    let attached = file(4);
    let whole = File::from(attached.fd.try_clone().unwrap());
    let mut receive_mapping = ReceiveMapping::new(&attached, 4 * PAGE_SIZE).unwrap();
    receive_mapping.prepare(1, 3).unwrap();
    let contents: Vec<u8> = (0..2 * PAGE_SIZE).map(|n| (n / PAGE_SIZE) as u8 + 7).collect();
    assert!(receive_mapping.write(1, &contents));
    let mut written = vec![0; 2 * PAGE_SIZE as usize];
    whole.read_exact_at(&mut written, PAGE_SIZE + PAGE_SIZE).unwrap();
    assert_eq!(written, contents);
    let mut page = [0; PAGE_SIZE as usize];
    assert!(receive_mapping.read(2, &mut page));
    assert_eq!(page, contents[PAGE_SIZE as usize..]);
    assert!(!receive_mapping.write(0, &contents), "not ready");
    assert!(!receive_mapping.write(3, &contents), "outside");
    // Without the end of the file there is no page to write to: SIGBUS.
    whole.set_len(PAGE_SIZE + 3 * PAGE_SIZE).unwrap();
    assert!(!receive_mapping.write(2, &contents));
    assert!(receive_mapping.write(1, &contents));
}
