use super::*;

#[test]
fn entries_are_told_apart() {
    let kinds = |raw| {
        let entry = RawEntry(raw);
        (entry.is_empty(), entry.is_poison_marker(), entry.is_guard())
    };
    assert_eq!(kinds(0), (true, false, false));
    assert_eq!(kinds(0x4000_0000_0000_005f), (false, true, false));
    // A uffd-wp marker, a swapped page, a present page, a guard, a soft-dirty bit alone.
    assert_eq!(kinds(0x4000_0000_0000_003f), (false, false, false));
    assert_eq!(kinds(0x4000_0000_0000_0040), (false, false, false));
    assert_eq!(kinds(0x8000_0000_0012_345f), (false, false, false));
    assert_eq!(kinds(1 << 58), (true, false, true));
    assert_eq!(kinds(1 << 55), (true, false, false));
    // Without CAP_SYS_ADMIN the type and the offset of a swapped entry are 0; the bits above are shown.
    for raw in [1 << 62, 1 << 62 | 1 << 55] {
        assert_eq!((kinds(raw), RawEntry(raw).is_hidden()), ((false, false, false), true));
    }
    assert!(!RawEntry(0x4000_0000_0000_005f).is_hidden());
}

#[test]
fn a_touched_page_has_an_entry() {
    let memory = vec![0u8; 64 * BASE_PAGE as usize];
    let base = (memory.as_ptr() as u64).next_multiple_of(BASE_PAGE);
    let page = base + 20 * BASE_PAGE;
    std::hint::black_box(memory[(page - memory.as_ptr() as u64) as usize]);
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    assert!(!entries(&pagemap, page, 1).unwrap()[0].is_empty(), "the page of zeros counts");
    let mut room = [PageRegion::default(); 2];
    match scan(&pagemap, page, page + BASE_PAGE, IS_PRESENT | IS_SWAPPED, &mut room) {
        Ok((found, end)) => {
            let here = PageRegion { start: page, end: page + BASE_PAGE, categories: IS_PRESENT };
            assert_eq!((found, end), (&[here][..], page + BASE_PAGE));
        }
        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOTTY)),
    }
}
