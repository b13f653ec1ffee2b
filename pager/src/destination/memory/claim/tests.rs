use proptest::prelude::*;

use super::*;

proptest! {
    #[test]
    fn the_first_run_of_ones_is_found(bits: u64) {
        let ones: Vec<u64> = (0..64).filter(|n| bits >> n & 1 == 1).collect();
        let found = first_run(bits);
        prop_assert_eq!(found.is_none(), ones.is_empty());
        if let Some((n, count)) = found {
            prop_assert_eq!(n, ones[0]);
            prop_assert!((n..n + count).all(|n| bits >> n & 1 == 1));
            prop_assert!(n + count == 64 || bits >> (n + count) & 1 == 0);
        }
    }
}
