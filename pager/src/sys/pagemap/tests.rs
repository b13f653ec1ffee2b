use super::*;

#[test]
fn entries_are_told_apart() {
    let raw = [0, 0x4000_0000_0000_005f, 0x4000_0000_0000_0040, 0x8000_0000_0012_3456, 1 << 62];
    let kinds = [Entry::Empty, Entry::PoisonMarker, Entry::Something, Entry::Something, Entry::Hidden];
    assert_eq!(raw.map(|raw| Entry::from(RawEntry(raw))), kinds);
}

#[test]
fn a_process_that_is_gone_is_not_empty_memory() {
    let gone = Pagemap::open(u32::MAX >> 2, Hva(0), PAGE_SIZE);
    assert!(matches!(gone, Err(PagemapError::ProcessGone { .. })), "{gone:?}");
}
