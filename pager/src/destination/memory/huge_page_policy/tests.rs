use proptest::prelude::*;

use super::*;

/// How many of so many blocks were made of huge pages, and the steps: of huge ones?, blocks.
fn course(blocks: u64, small: u64, huge: impl Fn(u64) -> u64) -> (u64, Vec<(bool, u64)>) {
    let (mut sizes, mut done, mut of_huge, mut steps) = (HugePagePolicy::new(true), 0, 0, vec![]);
    while done < blocks {
        let (is_huge, next) = (sizes.is_huge(), sizes.blocks().min(blocks - done));
        let each = if is_huge { huge(done) } else { small };
        sizes.took(is_huge, next, Duration::from_micros(each * next));
        steps.push((is_huge, next));
        done += next;
        of_huge += if is_huge { next } else { 0 };
    }
    (of_huge, steps)
}

#[test]
fn huge_pages_that_cost_less_are_all_but_the_first_block() {
    let (of_huge, steps) = course(64, 700, |_| 300);
    assert_eq!(of_huge, 63);
    assert_eq!(steps[..6], [(false, 1), (true, 1), (true, 2), (true, 4), (true, 4), (true, 4)]);
}

#[test]
fn huge_pages_that_cost_more_are_tried_ever_more_seldom() {
    let (of_huge, steps) = course(512 * 1024, 700, |_| 6000);
    assert!(of_huge < 12, "{of_huge}");
    assert_eq!(steps[..5], [(false, 1), (true, 1), (false, 4), (true, 1), (false, 4)]);
}

#[test]
fn huge_pages_that_become_cheap_are_found() {
    let (of_huge, _) = course(1024, 700, |done| if done < 40 { 6000 } else { 300 });
    assert!(of_huge > 900, "{of_huge}");
}

#[test]
fn none_are_huge_where_that_is_not_wanted() {
    let mut sizes = HugePagePolicy::new(false);
    for _ in 0..1000 {
        assert!(!sizes.is_huge());
        sizes.took(false, sizes.blocks(), Duration::from_micros(1));
    }
}

proptest! {
    #[test]
    fn every_step_continues(small in 0u64..10_000, costs in proptest::collection::vec(0u64..20_000, 1..50)) {
        let (of_huge, steps) = course(2048, small, |done| costs[done as usize % costs.len()]);
        prop_assert!(steps.iter().all(|(_, blocks)| (1..=MAX_BLOCKS_A_STEP).contains(blocks)));
        prop_assert_eq!(steps.iter().map(|(_, blocks)| blocks).sum::<u64>(), 2048);
        prop_assert!(of_huge < 2048);
    }
}
