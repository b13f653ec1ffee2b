use proptest::prelude::*;

use super::*;

fn kinds() -> impl Strategy<Value = FrameKind> {
    let origins = (0i32..6).prop_map(|n| ErrorOrigin::try_from(n).unwrap());
    let note = (origins, any::<bool>(), any::<u32>()).prop_map(|(origin, guest_visible, hop)| PoisonInfo {
        origin,
        guest_visible,
        hop,
    });
    prop_oneof![
        Just(FrameKind::Data),
        Just(FrameKind::Zero),
        note.prop_map(FrameKind::Poison),
        Just(FrameKind::End),
        Just(FrameKind::Failed)
    ]
}

proptest! {
    #[test]
    fn a_header_comes_out_as_it_went_in(kind in kinds(), region: u32, page: u64, count in 1u32..=64) {
        let header = FrameHeader { kind, region, page, count };
        prop_assert_eq!(FrameHeader::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn an_ask_comes_out_as_it_went_in(region: u32, page: u64, count: u32) {
        let ask = Ask { region, page, count };
        prop_assert_eq!(Ask::decode(&ask.encode()), ask);
    }

    #[test]
    fn any_bytes_are_a_frame_that_is_written_the_same_or_refused(bytes: [u8; HEADER_BYTES]) {
        if let Ok(header) = FrameHeader::decode(&bytes) {
            prop_assert_eq!(FrameHeader::decode(&header.encode()), Ok(header));
            prop_assert!(header.contents_bytes() <= 64 * 4096);
        }
    }
}

#[test]
fn the_bytes_are_those_of_the_contract() {
    let note = PoisonInfo { origin: ErrorOrigin::Read, guest_visible: true, hop: 7 };
    let header = FrameHeader { kind: FrameKind::Poison(note), region: 2, page: 0x0102, count: 3 };
    let mut bytes = [0; HEADER_BYTES];
    bytes[..3].copy_from_slice(&[3, 3, 1]);
    bytes[4] = 2;
    bytes[8..10].copy_from_slice(&[2, 1]);
    bytes[16] = 3;
    bytes[20] = 7;
    assert_eq!(header.encode(), bytes);
    assert_eq!(&hello(&[9; 32])[..9], b"VMFLANE1\x09");
    assert_eq!(Ask { region: 1, count: 2, page: 3 }.encode(), [1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn nonsense_is_refused_in_words() {
    for (kind, count, byte1, byte2, word) in [
        (0, 1, 0, 0, "kind"),
        (6, 1, 0, 0, "kind"),
        (1, 0, 0, 0, "DATA"),
        (1, 65, 0, 0, "DATA"),
        (2, 0, 0, 0, "no pages"),
        (3, 1, 99, 0, "origin"),
        (3, 1, 1, 2, "guest_visible"),
        (5, 4097, 0, 0, "reason"),
    ] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..3].copy_from_slice(&[kind, byte1, byte2]);
        bytes[16..20].copy_from_slice(&u32::to_le_bytes(count));
        let refused = FrameHeader::decode(&bytes).unwrap_err().to_string();
        assert!(refused.contains(word), "{refused}");
    }
}
