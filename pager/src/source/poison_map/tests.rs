use super::*;

fn poison(guest_visible: bool) -> PoisonInfo {
    PoisonInfo { origin: crate::proto::ErrorOrigin::Vmm, guest_visible, hop: 0 }
}

#[test]
fn an_error_that_the_guest_has_seen_stays_seen() {
    let mut map = PoisonMap::default();
    let id = PageId { region: 0, page: 7 };
    assert!(map.add(id, poison(true)));
    assert!(!map.add(id, poison(false)));
    assert_eq!(map.first_in(0, 0..100), Some((7, poison(true))));
    assert_eq!(map.first_in(0, 8..100), None);
    assert_eq!(map.first_in(1, 0..100), None);
}
