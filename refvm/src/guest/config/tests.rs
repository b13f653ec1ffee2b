use super::*;

fn region(gpa: u64, size: u64) -> MappedRegion {
    MappedRegion { gpa, hva: 0, size }
}

#[test]
fn shares_cover_every_page_once_and_keep_out_of_the_kernel_area() {
    let regions = [region(0, 24 << 20), region(1 << 32, 5 << 20)];
    let all: Vec<u64> = shares(&regions, 3).iter().flatten().flat_map(|run| run.first..run.first + run.count).collect();
    let expected: Vec<u64> = (4096..6144).chain((1 << 20)..(1 << 20) + 1280).collect();
    assert_eq!(all, expected);
}

#[test]
fn a_region_wholly_within_the_kernel_area_has_no_workload() {
    assert!(workload_runs(&[region(0, KERNEL_BYTES)]).is_empty());
}
