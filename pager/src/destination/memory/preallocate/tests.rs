use super::*;
use crate::proto;
use crate::sys::memfd::memfd;
use crate::sys::testing::TestMemory;
use crate::sys::uffd_probe::probe;
use crate::sys::userfaultfd::{UffdEvent, feature};

/// Memory of so many blocks in a file, `skew` bytes before a block begins; what a VMM, which is this process, has mapped.
fn target(blocks: u64, skew: u64) -> Option<(MemoryLayout, PreallocateTarget, TestMemory)> {
    let features = feature::MISSING_SHMEM | feature::MINOR_SHMEM;
    if let Err(reason) = probe(features) {
        eprintln!("skipped: {reason}");
        return None;
    }
    let size = blocks * HUGE_PAGE_SIZE;
    let file = AttachedFile { fd: memfd("guest", size + HUGE_PAGE_SIZE).unwrap(), offset: HUGE_PAGE_SIZE - skew };
    let memory = TestMemory::of_file(&file.fd, file.offset, size);
    let uffd = Userfaultfd::create().unwrap();
    uffd.enable(features).unwrap();
    let hva = memory.hva();
    uffd.register_minor(hva, size).unwrap();
    let backing = proto::Backing::Memfd.into();
    let region = proto::MemoryRegion { gpa: 0, size, page_size: PAGE_SIZE, backing };
    let layout = MemoryLayout::try_from(&proto::MemoryLayout { regions: vec![region] }).unwrap();
    Some((layout, PreallocateTarget { file, uffd, vmm_pid: std::process::id(), hva, size }, memory))
}

/// Bytes of this process's mapping of a landing that are mapped by huge pages.
fn in_huge_pages(receive_mapping: &ReceiveMapping) -> u64 {
    let at = format!("{:x}-", receive_mapping.ready(0, 1).unwrap().address());
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mapping = smaps.lines().skip_while(|line| !line.starts_with(&at));
    let line = mapping.take(40).find(|line| line.starts_with("ShmemPmdMapped:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn blocks_are_joined_and_every_touch_is_still_told() {
    for skew in [0, 5 * PAGE_SIZE] {
        let Some((_, target, memory)) = target(4, skew) else { return };
        let mut region = PreparedRegion::new(&target);
        let (at, size) = (skew, 2 * HUGE_PAGE_SIZE);
        let joined = region.join(at, size).unwrap();
        region.fill(0, target.size).unwrap();
        let receive_mapping = region.receive_mapping.as_ref().unwrap();
        if joined {
            assert_eq!(in_huge_pages(receive_mapping), size, "{skew}");
        } else {
            eprintln!("no huge page is to be had here");
        }
        assert!(receive_mapping.write(at / PAGE_SIZE + 1, &[7; PAGE_SIZE as usize]));
        for page in [0, at / PAGE_SIZE + 1, (at + size) / PAGE_SIZE, target.size / PAGE_SIZE - 1] {
            let address = memory.at(page * PAGE_SIZE);
            let touch = std::thread::scope(|scope| {
                let touch = scope.spawn(|| memory.load(page * PAGE_SIZE));
                let told = std::iter::repeat_with(|| target.uffd.read_events().unwrap())
                    .find(|events| !events.is_empty())
                    .unwrap();
                assert!(
                    matches!(told[..], [UffdEvent::Fault { at, minor: true, .. }] if at.0 / PAGE_SIZE == address / PAGE_SIZE),
                    "{told:?}"
                );
                assert_eq!(target.uffd.map(Hva(address), PAGE_SIZE).stop, None);
                touch.join().unwrap()
            });
            assert_eq!(touch, if page == at / PAGE_SIZE + 1 { 7 } else { 0 });
        }
    }
}

#[test]
fn memory_that_the_vmm_has_touched_is_refused_where_it_would_be_seen() {
    for (huge_pages, page, refused) in
        [(true, 2 * HUGE_PAGE_SIZE, true), (true, HUGE_PAGE_SIZE / 2, false), (false, 2 * HUGE_PAGE_SIZE, false)]
    {
        let Some((layout, target, memory)) = target(4, 0) else { return };
        target.uffd.unregister(target.hva, target.size).unwrap();
        // Of the first block, which is of small pages, or behind the second.
        memory.load(page);
        target.uffd.register_minor(target.hva, target.size).unwrap();
        let held = [PageRange { region: 0, page: 0, count: target.size / PAGE_SIZE }];
        let address = format!("{:#x}", target.hva.0 + page);
        let (receive_mappings, ready) = preallocate(&layout, &[Some(target)], &held, huge_pages);
        match ready {
            Ok(bytes) => assert_eq!((bytes, refused), (4 * HUGE_PAGE_SIZE, false)),
            Err(error) => {
                assert!(refused && error.to_string().contains(&address), "{error}");
                assert!(matches!(error, PreallocateError::Touched { .. }));
            }
        }
        assert_eq!(receive_mappings.len(), 1);
    }
}
