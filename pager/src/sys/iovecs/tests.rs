use super::*;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use crate::layout::PAGE_SIZE;
use crate::sys::memfd::memfd;
use crate::sys::page_mapping::PageMapping;

const PAGE: usize = PAGE_SIZE as usize;

#[test]
fn places_that_touch_are_one() {
    let (mut first, mut second) = ([0u8; 12], [0u8; 4]);
    let mut iovecs = IoVecs::default();
    let (front, back) = first.split_at_mut(5);
    let (near, far) = front.split_at_mut(2);
    let mut places = iovecs.start();
    for place in [near, far, &mut second, &mut back[4..]] {
        places.push(place);
    }
    let lengths: Vec<_> = places.vectors.iter().map(|vector| vector.iov_len).collect();
    assert_eq!(lengths, [5, 4, 3]);
    assert!(iovecs.start().vectors.is_empty());
}

#[test]
fn bytes_go_from_the_pages_of_one_file_to_those_of_another() {
    let (from, to) =
        (File::from(memfd("from", 2 * PAGE_SIZE).unwrap()), File::from(memfd("to", 2 * PAGE_SIZE).unwrap()));
    from.write_all_at(&[7; PAGE], PAGE_SIZE).unwrap();
    let (here, there) = UnixStream::pair().unwrap();
    let source = PageMapping::readable(&from, 0, 2 * PAGE_SIZE).unwrap();
    let header = SendBytes::of(b"head");
    let contents = SendBytes::of_pages(source.pages(1, 1).unwrap());
    assert_eq!(send(&here, [header.part(1, 2), contents.part(0, usize::MAX)]).unwrap(), 2 + PAGE);
    assert_eq!(send(&here, [header.part(4, 9), contents.part(PAGE - 1, 9)]).unwrap(), 1);
    let target = PageMapping::writable(&to, 0, 2 * PAGE_SIZE).unwrap();
    let (mut head, mut tail, mut iovecs) = ([0; 2], [0; 9], IoVecs::default());
    let mut places = iovecs.start();
    places.push(&mut head);
    places.push_pages(target.pages(0, 1).unwrap());
    places.push(&mut tail);
    assert_eq!(places.receive(&there).unwrap(), 2 + PAGE + 1);
    let mut received = [0; PAGE];
    to.read_exact_at(&mut received, 0).unwrap();
    assert_eq!((head, received, tail[0]), (*b"ea", [7; PAGE], 7));
}

#[test]
fn a_page_that_cannot_be_written_is_an_error() {
    let (mut here, there) = UnixStream::pair().unwrap();
    here.write_all(&[1; PAGE]).unwrap();
    let file = File::from(memfd("guest", PAGE_SIZE).unwrap());
    let read_only = PageMapping::readable(&file, 0, PAGE_SIZE).unwrap();
    let mut iovecs = IoVecs::default();
    let mut places = iovecs.start();
    places.push_pages(read_only.pages(0, 1).unwrap());
    assert_eq!(places.receive(&there).unwrap_err().raw_os_error(), Some(libc::EFAULT));
}
