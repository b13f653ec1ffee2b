use super::*;

const MAPS: &str = "\
7f0000000000-7f0000200000 rw-s 00001000 00:01 77                         /memfd:pc.ram (deleted)
7f0000200000-7f0000300000 rw-p 00000000 00:00 0
7f0000400000-7f0000401000 rw-p 00000000 00:00 0                          [stack]
";

fn range(start: u64, size: u64) -> HvaRange {
    HvaRange { start, size }
}

#[test]
fn a_range_over_two_mappings_has_a_piece_of_each() {
    let pieces = Mappings::parse(MAPS).pieces(&range(0x7f00_001f_f000, 0x3000)).unwrap();
    let places: Vec<_> = pieces.iter().map(|piece| (piece.start, piece.size(), piece.offset, piece.shared)).collect();
    assert_eq!(
        places,
        [(0x7f00_001f_f000, 0x1000, 0x20_0000, true), (0x7f00_0020_0000, 0x2000, 0, false)],
        "the offset is that of the piece"
    );
    assert_eq!(pieces[0].path, "/memfd:pc.ram (deleted)");
}

#[test]
fn the_first_hole_is_named() {
    let mappings = Mappings::parse(MAPS);
    let address = |start, size| match mappings.pieces(&range(start, size)) {
        Err(Error::NotMapped { address }) => Some(address),
        _ => None,
    };
    assert_eq!(address(0x7f00_002f_f000, 0x2000), Some(0x7f00_0030_0000));
    assert_eq!(address(0x7f00_0050_0000, 0x1000), Some(0x7f00_0050_0000));
    assert_eq!(address(0x1000, 0x1000), Some(0x1000));
}

#[test]
fn a_range_that_is_not_of_whole_pages_is_refused() {
    for (start, size) in [(1, 4096), (4096, 1), (4096, 0), (u64::MAX - 4095, 4096), (u64::MAX - 4095, 8192)] {
        assert!(matches!(end_of(&range(start, size)), Err(Error::Invalid { .. })), "{start:#x} {size:#x}");
    }
}
