use super::*;

#[test]
fn a_page_is_whole_when_every_piece_has_come_in_whatever_order_and_how_often() {
    let mut page = HugePageStaging::new(130);
    let piece = |byte: u8| [byte; PAGE_SIZE as usize];
    for at in (1..130).rev().chain(1..130).chain([129]) {
        assert!(page.whole().is_none());
        page.add(at, 1, Some(&piece(at as u8)));
    }
    page.add(0, 1, None);
    let bytes = page.whole().unwrap();
    assert!(bytes.chunks_exact(PAGE_SIZE as usize).zip(0u8..).all(|(page, byte)| page == piece(byte)));
}

#[test]
fn several_pieces_come_at_once() {
    let mut page = HugePageStaging::new(4);
    page.add(1, 2, Some(&[7; 2 * PAGE_SIZE as usize]));
    page.add(0, 4, None);
    let bytes = page.whole().unwrap();
    assert_eq!([0, 1, 2, 3].map(|n| bytes[n * PAGE_SIZE as usize]), [0, 7, 7, 0]);
}
