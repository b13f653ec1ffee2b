use super::*;

#[test]
fn an_early_error_is_told_once_and_not_after_its_consumption() {
    let [one, two] = [0x1000, 0x2000].map(Block::page);
    let mut told = Told::default();
    assert!(told.found(one));
    assert!(!told.found(one));
    told.consumed(two);
    assert!(!told.found(two) && told.is_superfluous(two) && !told.is_superfluous(one));
    assert!(told.announce(one) && !told.announce(one));
}

#[test]
fn a_known_huge_page_covers_its_parts_but_no_part_covers_the_whole() {
    let (huge, part) = (Block::around(0x20_0000, 21), Block::page(0x20_3000));
    let mut told = Told::default();
    assert!(told.found(part) && told.found(huge) && !told.found(Block::page(0x20_5000)));
    told.consumed(huge);
    assert!(told.is_superfluous(part) && !told.is_superfluous(Block::page(0x40_0000)));
}

#[test]
fn the_status_words_are_those_of_qemu() {
    let [required, optional] =
        [Severity::Required, Severity::Optional].map(|severity| machine_check(Block::page(0x5000), severity));
    assert_eq!((required.status, required.mcg_status), (0xbd80_0000_0000_0134, 7));
    assert_eq!((optional.status, optional.mcg_status), (0xbd00_0000_0000_00c0, 5));
    assert_eq!((required.misc, required.addr, required.bank), (0x8c, 0x5000, 9));
    let huge = machine_check(Block::around(0x7f_ffff, 21), Severity::Required);
    assert_eq!((huge.misc, huge.addr), (0x95, 0x60_0000));
}
