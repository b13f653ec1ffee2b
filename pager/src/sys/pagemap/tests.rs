use super::*;

#[test]
fn entries_are_told_apart() {
    assert_eq!(Entry::from(0), Entry::Empty);
    assert_eq!(Entry::from(0x4000_0000_0000_005f), Entry::PoisonMarker);
    // A uffd-wp marker, a swapped page, a present page, a soft-dirty bit alone.
    assert_eq!(Entry::from(0x4000_0000_0000_003f), Entry::Something);
    assert_eq!(Entry::from(0x4000_0000_0000_0040), Entry::Something);
    assert_eq!(Entry::from(0x8000_0000_0012_3456), Entry::Something);
    assert_eq!(Entry::from(1 << 55), Entry::Empty);
    // Without CAP_SYS_ADMIN the type and the offset of a swapped entry are 0; the bits above are shown.
    assert_eq!(Entry::from(1 << 62), Entry::Hidden);
    assert_eq!(Entry::from(1 << 62 | 1 << 55), Entry::Hidden);
}

#[test]
fn a_process_that_is_gone_is_not_empty_memory() {
    let gone = Pagemap::open(u32::MAX >> 2, Hva(0), PAGE_SIZE);
    assert!(matches!(gone, Err(PagemapError::ProcessGone { .. })), "{gone:?}");
}
