use std::cell::RefCell;

use super::*;

const HUGE: u64 = 2 << 20;
const PIECES: u64 = HUGE / PAGE_SIZE;

/// A file with a bad piece in its second huge page. A read stops in front of it; `reads` gets the offset of each.
fn file_with_a_bad_piece(reads: &RefCell<Vec<u64>>) -> impl Fn(u64, &mut [u8]) -> io::Result<usize> {
    let bad = HUGE + 300 * PAGE_SIZE;
    move |at, buffer| {
        reads.borrow_mut().push(at);
        match bad.checked_sub(at) {
            Some(0) => Err(io::Error::from_raw_os_error(libc::EIO)),
            Some(before) => Ok(buffer.len().min(before as usize)),
            None => Ok(buffer.len()),
        }
    }
}

#[test]
fn only_pieces_under_markers_stay_marked() {
    let (errors, reads) = (HugePageErrors::new(HUGE), RefCell::default());
    let pread = file_with_a_bad_piece(&reads);
    let mut marked = [true; 8];
    errors.leave_markers(PIECES - 4, &mut marked, &pread);
    assert_eq!(marked, [true, true, true, true, false, false, false, false]);
    let mut marked = [true, false, true];
    errors.leave_markers(2 * PIECES - 2, &mut marked, &pread);
    assert_eq!(marked, [false, false, true]);
}

#[test]
fn a_page_is_read_once_until_the_vm_has_run() {
    let (errors, reads) = (HugePageErrors::new(HUGE), RefCell::default());
    let pread = file_with_a_bad_piece(&reads);
    errors.leave_markers(0, &mut [true; 64], &pread);
    let once = reads.borrow().len();
    errors.leave_markers(64, &mut [true; 64], &pread);
    assert_eq!(reads.borrow().len(), once);
    errors.forget();
    errors.leave_markers(64, &mut [true; 64], &pread);
    assert_eq!(reads.borrow().len(), 2 * once);
}

#[test]
fn another_error_than_eio_is_no_bad_frame() {
    let errors = HugePageErrors::new(HUGE);
    let mut marked = [true; 2];
    errors.leave_markers(0, &mut marked, |_, _| Err(io::Error::from_raw_os_error(libc::ENXIO)));
    assert_eq!(marked, [true; 2]);
}
