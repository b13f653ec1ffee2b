use super::*;

#[test]
fn places_that_touch_are_one() {
    let (mut first, mut second, mut last) = ([0u8; 12], [0u8; 4], [0u8; 2]);
    let (at, elsewhere, end) = (first.as_mut_ptr(), second.as_mut_ptr(), last.as_mut_ptr());
    let mut iovecs = IoVecs::default();
    iovecs.only(&mut last);
    iovecs.clear();
    for (at, bytes) in [(at, 2), (at.wrapping_add(2), 3), (elsewhere, 4), (at.wrapping_add(9), 1), (end, 2)] {
        iovecs.then(at, bytes);
    }
    let told: Vec<_> = iovecs.vectors().iter().map(|v| (v.iov_base.cast(), v.iov_len)).collect();
    assert_eq!(told, [(at, 5), (elsewhere, 4), (at.wrapping_add(9), 1), (end, 2)]);
}
