use super::*;

#[test]
fn blocks_are_aligned_and_cover_their_pages() {
    let huge = Block::around(0x123_4567, 21);
    assert_eq!((huge, huge.size()), (Block { gpa: 0x120_0000, lsb: 21 }, 2 << 20));
    assert!(huge.covers(huge) && huge.covers(Block::page(0x13f_ffff)) && !Block::page(0x120_0000).covers(huge));
    assert!(!huge.covers(Block::page(0x140_0000)) && Block::around(0, 30).covers(huge));
    assert_eq!((Block::around(0x1fff, 0).lsb, Block::around(0x1fff, 63).lsb), (12, 30));
}

#[test]
fn a_memory_error_takes_a_page_of_the_backing() {
    let region = |gpa, size| MappedRegion { gpa, hva: 0, size };
    let ram =
        Ram { regions: [region(0, 64 << 20), region(1 << 32, 64 << 20)].into(), page_sizes: [4096, 2 << 20].into() };
    assert_eq!(ram.block_at(0x5123), Block::page(0x5000));
    assert_eq!(ram.block_at((1 << 32) + 0x30_5123), Block { gpa: (1 << 32) + 0x20_0000, lsb: 21 });
    assert_eq!(Ram::from(ram.regions).block_at((1 << 32) + 0x30_5123), Block::page((1 << 32) + 0x30_5000));
}
