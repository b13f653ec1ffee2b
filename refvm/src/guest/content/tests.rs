use super::*;

#[test]
fn a_page_names_itself_and_its_generation() {
    let mut page = [0; WORDS];
    fill(7, 4711, 3, &mut page);
    assert_eq!((page[0], page[1]), (4711, 3));
    assert_eq!(wrong_bytes(7, 4711, 3, &page), 0);
}

#[test]
fn each_wrong_byte_counts() {
    let mut page = [0; WORDS];
    fill(7, 4711, 3, &mut page);
    page[511] ^= 0x00ff_0000_0000_0001;
    page[0] ^= 1;
    assert_eq!(wrong_bytes(7, 4711, 3, &page), 3);
}

#[test]
fn a_zero_page_a_stale_page_and_a_stranger_show() {
    let mut page = [0; WORDS];
    assert!(wrong_bytes(7, 4711, 3, &page) > 4000);
    for (seed, number, generation) in [(7, 4711, 2), (7, 4710, 3), (8, 4711, 3)] {
        fill(seed, number, generation, &mut page);
        assert!(wrong_bytes(7, 4711, 3, &page) > 4000);
    }
}
