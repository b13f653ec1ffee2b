use super::*;
use crate::layout::Backing;

fn address_map() -> AddressMap {
    let region =
        |gpa, pages: u64| Region { gpa: Gpa(gpa), size: pages << 12, page_size: 4096, backing: Backing::Memfd };
    let layout = MemoryLayout::new(vec![region(0, 4), region(0x10_0000, 2)]).unwrap();
    AddressMap::new(PageNumbering::new(&layout), vec![Hva(0x7000_0000), Hva(0x6000_0000)]).unwrap()
}

#[test]
fn numbers_continue_from_region_to_region() {
    let p = address_map();
    assert_eq!(p.numbering().index_of(PageId { region: 1, page: 1 }), Some(PageIndex(5)));
    assert_eq!(p.numbering().region_of(PageIndex(4)).unwrap().number, 1);
    assert!(p.numbering().region_of(PageIndex(6)).is_none());
    assert_eq!(p.numbering().pages_of_block(Gpa(0x10_1fff), 12), [PageIndex(5)]);
    assert_eq!(p.numbering().pages_of_block(Gpa(0x4000), 12), []);
}

#[test]
fn addresses_and_pages_are_inverse() {
    let p = address_map();
    for page in (0..6).map(PageIndex) {
        let (hva, size) = p.address_of(page).unwrap();
        assert_eq!(p.page_at(Hva(hva.0 + size - 1)), Some(page));
    }
    assert_eq!(p.address_of(PageIndex(6)), None);
    assert_eq!(p.page_at(Hva(0x7000_4000)), None);
}

#[test]
fn a_range_covers_the_pages_that_it_touches() {
    let p = address_map();
    assert_eq!(p.pages_in(Hva(0x7000_0fff), Hva(0x7000_1001)), vec![(PageIndex(0), PageIndex(2))]);
    assert_eq!(p.pages_in(Hva(0x6000_1000), Hva(0x6fff_0000)), vec![(PageIndex(5), PageIndex(6))]);
    assert!(p.pages_in(Hva(0), Hva(0x1000)).is_empty());
}
