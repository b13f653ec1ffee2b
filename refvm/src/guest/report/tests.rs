use super::*;

#[test]
fn buckets_ascend_and_contain_their_middle() {
    assert!((4..100_000u64).all(|t| bucket(t) <= bucket(t + 1)));
    assert!((8..BUCKETS - 8).all(|b| bucket(bucket_middle(b) as u64) == b));
    assert!(bucket(u64::MAX) < BUCKETS);
}

#[test]
fn a_record_being_written_is_left_out() {
    // SAFETY: all-zero is a value of these plain structures.
    let (header, block): (ReportHeader, VcpuBlock) = unsafe { std::mem::zeroed() };
    let records = [
        MachineCheckRecord { gpa: 0x20_0000, severity: SEVERITY_AR, vcpu: 1, lsb: 21 },
        MachineCheckRecord::being_written(Block::page(0x6000), 0),
    ];
    let report = Report::new(&header, &[block], &records, 1_000_000, None);
    assert_eq!(report.machine_checks, [MachineCheck { gpa: 0x20_0000, lsb: 21, severity: "AR", vcpu: 1 }]);
    assert_eq!(report.poisoned_touched, 1);
}

#[test]
fn quantiles_come_from_all_vcpus() {
    // SAFETY: all-zero is a value of this plain structure.
    let mut blocks: [VcpuBlock; 2] = unsafe { std::mem::zeroed() };
    blocks[0].first_touch[bucket(1000)] = 98;
    blocks[1].first_touch[bucket(100_000)] = 2;
    blocks[1].first_touch_max = 120_000;
    let blocks = [&blocks[0], &blocks[1]];
    let found = first_touch(&blocks, 1_000_000);
    assert_eq!(found.count, 100);
    assert!(found.p50 > 0.9 && found.p50 < 1.2 && found.p99 > 90.0 && found.max == 120.0, "{found:?}");
    let all = buckets(&blocks, 1_000_000);
    assert!(matches!(all[..], [(a, b, 98), (c, d, 2)] if a <= 1.0 && 1.0 < b && c <= 100.0 && 100.0 < d), "{all:?}");
}

#[test]
fn a_vcpu_that_has_not_run_on_this_host_tells_nothing_of_it() {
    // SAFETY: all-zero is a value of these plain structures.
    let (header, mut blocks): (ReportHeader, [VcpuBlock; 3]) = unsafe { std::mem::zeroed() };
    for (block, count) in blocks.iter_mut().zip([10, 200, 3000]) {
        block.first_touch[bucket(1000)] = count;
        block.first_touch_max = count * 1000;
        block.blackout = count * 1000;
    }
    for (epochs, counted) in [
        ([2, 1, 2], 3010),
        ([1, 2, 1], 200),
        ([1, 0, 0], 10),
        ([0, 0, 0], 0),
        ([1, 255, 254], 10),
        ([254, 255, 255], 3200),
        ([7, 7, 7], 3210),
    ] {
        blocks.iter_mut().zip(epochs).for_each(|(block, epoch)| block.epoch = epoch);
        let report = Report::new(&header, &blocks, &[], 1_000_000, newest(&blocks));
        let of_buckets: u64 = report.first_touch_buckets.iter().map(|(_, _, count)| count).sum();
        assert_eq!((report.first_touch_us.count, of_buckets), (counted, counted), "{epochs:?}");
        let found = [(1000, 3000.0), (100, 200.0), (10, 10.0)].into_iter().find(|(least, _)| counted >= *least);
        let longest = found.map_or(0.0, |(_, longest)| longest);
        assert_eq!((report.first_touch_us.max, report.blackout_us), (longest, longest));
    }
    // All of them still tell of the host before.
    let report = Report::new(&header, &blocks, &[], 1_000_000, Some(8));
    assert_eq!((report.first_touch_us, report.first_touch_buckets, report.blackout_us), Default::default());
}
