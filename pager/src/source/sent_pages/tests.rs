use super::*;
use crate::layout::{Backing, Gpa, PAGE_SIZE, Region};

#[test]
fn a_marked_run_and_nothing_else_is_contained() {
    let region = |gpa| Region { gpa: Gpa(gpa), size: 200 * PAGE_SIZE, page_size: PAGE_SIZE, backing: Backing::Memfd };
    let sent = SentPages::new(&MemoryLayout::new(vec![region(0), region(1 << 30)]).unwrap());
    sent.mark(PageRun { region: 1, page: 60, count: 70 });
    for region in 0..2 {
        let marked: Vec<u64> = (0..200).filter(|page| sent.contains(PageId { region, page: *page })).collect();
        assert_eq!(marked, if region == 1 { (60..130).collect() } else { vec![] });
    }
}
