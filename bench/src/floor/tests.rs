use super::*;

#[test]
fn no_page_is_touched_twice() {
    let mut order = scattered(16384, 16384);
    assert_ne!(order[..3], [0, 1, 2]);
    order.sort_unstable();
    assert_eq!(order, (0..16384).collect::<Vec<_>>());
}
