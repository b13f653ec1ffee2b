use std::cell::RefCell;

use super::*;

#[test]
fn a_block_is_looked_at_once_a_stop() {
    let whole = FullBlocks::new(3 * BLOCK + 100);
    let looks = RefCell::new(Vec::new());
    let has = |page, count| {
        whole.has(page, count, |first, pages| {
            looks.borrow_mut().push((first, pages));
            first != BLOCK
        })
    };
    for _ in 0..2 {
        assert_eq!([has(0, 1), has(511, 1), has(512, 1)], [true, true, false]);
        assert_eq!([has(500, 64), has(1536, 100), has(1520, 64)], [false, true, true]);
        assert_eq!(looks.take(), [(0, 512), (512, 512), (1536, 100), (1024, 512)]);
        assert!(has(0, 512) && !has(0, 1636) && !has(2048, 1));
        assert_eq!(looks.take(), []);
        whole.forget();
    }
}

#[test]
fn findings_from_before_a_stop_are_forgotten() {
    let whole = FullBlocks::new(BLOCK);
    assert!(whole.has(0, 1, |_, _| {
        whole.forget();
        true
    }));
    assert!(!whole.has(0, 1, |_, _| false));
}
