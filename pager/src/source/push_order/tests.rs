use proptest::prelude::*;

use super::*;
use crate::layout::{Backing, Gpa, Region};

fn layout(sizes: &[(u64, u64)]) -> MemoryLayout {
    let mut gpa = 0u64;
    let regions = sizes.iter().map(|(pages, page_size)| {
        let at = gpa.next_multiple_of(*page_size);
        gpa = at + pages * page_size;
        Region { gpa: Gpa(at), size: pages * page_size, page_size: *page_size, backing: Backing::Anonymous }
    });
    MemoryLayout::new(regions.collect()).unwrap()
}

#[test]
fn demand_goes_first_then_its_neighbours_then_ascending() {
    let layout = layout(&[(64 * 20, 4096)]);
    let all = PageRun { region: 0, page: 0, count: 64 * 20 };
    let mut order = PushOrder::new(&layout, [all]);
    let hint = Some(PageId { region: 0, page: 64 * 10 + 3 });
    let chunks: Vec<u64> =
        std::iter::from_fn(|| order.next_chunk(hint)).map(|runs| runs[0].page / 64).take(11).collect();
    assert_eq!(chunks, [10, 11, 12, 13, 14, 9, 8, 7, 6, 0, 1]);
}

proptest! {
    #[test]
    fn every_page_is_handed_out_once_whatever_the_demand(
        pages in 1u64..500,
        huge in 1u64..5,
        ranges in prop::collection::vec((0u64..500, 1u64..120), 0..8),
        demand in prop::collection::vec(prop::option::of((0u32..3, 0u64..600)), 0..64),
    ) {
        let layout = layout(&[(pages, 4096), (huge, 2 << 20)]);
        let mut runs: Vec<PageRun> = ranges
            .iter()
            .filter(|(page, _)| *page < pages)
            .map(|(page, count)| PageRun { region: 0, page: *page, count: (*count).min(pages - page) })
            .collect();
        runs.push(PageRun { region: 1, page: 0, count: huge });
        let expected: std::collections::BTreeSet<(u32, u64)> =
            runs.iter().flat_map(|r| (r.page..r.page + r.count).map(|p| (r.region, p))).collect();
        let mut order = PushOrder::new(&layout, runs);
        let mut demand = demand.into_iter().cycle();
        let mut seen = std::collections::BTreeSet::new();
        loop {
            let hint = demand.next().flatten().map(|(region, page)| PageId { region, page });
            let Some(chunk) = order.next_chunk(hint) else { break };
            prop_assert!(!chunk.is_empty());
            for run in chunk {
                for page in run.page..run.page + run.count {
                    prop_assert!(seen.insert((run.region, page)), "page {page} twice");
                }
            }
        }
        prop_assert_eq!(seen, expected);
    }
}
