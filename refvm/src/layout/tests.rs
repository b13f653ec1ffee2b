use super::*;

#[test]
fn small_memory_is_one_region_from_zero() {
    let regions = split(512 << 20, 1, Backing::Anonymous).unwrap();
    assert_eq!(regions, [RegionSpec { gpa: 0, size: 512 << 20, page_size: 4096, backing: Backing::Anonymous }]);
}

#[test]
fn memory_beyond_three_gib_continues_at_four() {
    let regions = split(5 << 30, 1, Backing::Memfd).unwrap();
    let ranges: Vec<_> = regions.iter().map(|r| (r.gpa, r.size)).collect();
    assert_eq!(ranges, [(0, 3 << 30), (4 << 30, 2 << 30)]);
}

#[test]
fn every_split_passes_the_check_and_loses_no_page() {
    for (memory, count) in [(64 << 20, 3), (512 << 20, 7), (4 << 30, 2), (5 << 30, 5), (33 << 20, 1)] {
        let regions = split(memory, count, Backing::Memfd).unwrap();
        check(&regions).unwrap();
        assert_eq!(regions.iter().map(|r| r.size).sum::<u64>(), memory);
        assert!(regions.len() >= count as usize);
    }
}

#[test]
fn regions_are_whole_huge_pages() {
    let of = |memory, count, page_size| split(memory, count, MadeOf { backing: Backing::Memfd, page_size });
    for (memory, count, page_size) in [(66 << 20, 3, 2 << 20), (5 << 30, 2, 1 << 30), (1 << 30, 1, 1 << 30)] {
        let regions = of(memory, count, page_size).unwrap();
        check(&regions).unwrap();
        assert!(regions.iter().all(|r| r.page_size == page_size), "{regions:?}");
        assert_eq!(regions.iter().map(|r| r.size).sum::<u64>(), memory);
    }
    assert_eq!(of(65 << 20, 1, 2 << 20).unwrap_err().field, "--memory");
    assert_eq!(of(512 << 20, 1, 1 << 30).unwrap_err().field, "--memory");
    assert_eq!(of(1 << 30, 2, 1 << 30).unwrap_err().field, "--regions");
}

#[test]
fn refusals_name_the_field() {
    let good = split(64 << 20, 2, Backing::Memfd).unwrap();
    let refused = |change: fn(&mut Vec<RegionSpec>)| {
        let mut regions = good.clone();
        change(&mut regions);
        check(&regions).unwrap_err()
    };
    assert_eq!(refused(Vec::clear).field, "regions");
    assert_eq!(refused(|r| r[0].gpa = 4096).field, "regions[0].gpa");
    assert_eq!(refused(|r| r[1].gpa = 4096).field, "regions[1].gpa");
    assert_eq!(refused(|r| r[1].size += 1).field, "regions[1].size");
    assert_eq!(refused(|r| r[1].size = u64::MAX - 4095).field, "regions[1].size");
    let odd = refused(|r| r[1].page_size = 8192);
    assert_eq!((odd.field.as_str(), odd.unsupported), ("regions[1].page_size", true));
    assert_eq!(refused(|r| (r[1].page_size, r[1].size) = (2 << 20, 3 << 20)).field, "regions[1].size");
    assert_eq!(refused(|r| (r[1].page_size, r[1].gpa) = (2 << 20, 33 << 20)).field, "regions[1].gpa");
    assert_eq!(split(1 << 20, 1, Backing::Memfd).unwrap_err().field, "--memory");
    assert_eq!(split(64 << 20, 8, Backing::Memfd).unwrap_err().field, "--regions");
}
