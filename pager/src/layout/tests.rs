use super::*;

#[test]
fn an_error_covers_every_page_of_its_block() {
    let region = |gpa, size| Region { gpa: Gpa(gpa), size, page_size: 4096, backing: Backing::Memfd };
    let layout = MemoryLayout::new(vec![region(0, 1 << 20), region(2 << 20, 1 << 20)]).unwrap();
    let third = PageId { region: 0, page: 3 };
    assert_eq!(layout.pages_of_block(Gpa(0x3abc), 12), [third]);
    assert_eq!(layout.pages_of_block(Gpa(0x3000), 0), [third]);
    assert_eq!(layout.pages_of_block(Gpa(0x20_0000), 21).len(), 256);
    assert_eq!(layout.pages_of_block(Gpa(0x2f_f000), 21).len(), 256, "the block, not what lies behind the address");
    assert_eq!(layout.pages_of_block(Gpa(0x18_0000), 12), []);
    assert_eq!(layout.pages_of_block(Gpa(0x3000), 200).len(), 512);
}

#[test]
fn a_page_larger_than_the_block_is_covered_whole() {
    let region = Region { gpa: Gpa(0), size: 4 << 20, page_size: 2 << 20, backing: Backing::Anonymous };
    let layout = MemoryLayout::new(vec![region]).unwrap();
    assert_eq!(layout.pages_of_block(Gpa(0x20_3000), 12), [PageId { region: 0, page: 1 }]);
}
