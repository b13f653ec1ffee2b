use super::*;
use crate::guest::USER_STACKS_GPA;
use crate::machine::REPORT_GPA;

#[test]
fn the_pieces_do_not_overlap() {
    let regions = [MappedRegion { gpa: 0, hva: 0, size: 512 << 20 }];
    let mut extents: Vec<(u64, u64)> =
        processor_pieces(&regions, 16).iter().map(|p| (p.gpa, p.gpa + p.bytes.len() as u64)).collect();
    extents.extend([(KERNEL_STACKS_GPA, USER_STACKS_GPA), (REPORT_GPA, REPORT_GPA + 17 * PAGE_SIZE)]);
    extents.sort_unstable();
    assert!(extents.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{extents:x?}");
}

#[test]
fn the_code_ends_before_the_stubs() {
    assert!((payload().code.len() as u64) < STUBS_OFFSET);
}
