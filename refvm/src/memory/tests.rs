use super::*;
use crate::layout::{MadeOf, split};

#[test]
fn both_backings_read_as_zeros_and_keep_writes() {
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let memory = GuestMemory::new(&split(64 << 20, 2, backing).unwrap()).unwrap();
        assert_eq!(memory.regions().len(), 2);
        for region in memory.regions() {
            let last = (region.hva + region.spec.size - 8) as *mut u64;
            // SAFETY: inside the region, which is mapped and used by nobody else.
            unsafe {
                assert_eq!(last.read_volatile(), 0);
                last.write_volatile(7);
                assert_eq!(last.read_volatile(), 7);
            }
            assert_eq!(region.file.is_some(), backing == Backing::Memfd);
        }
    }
}

#[test]
fn memory_for_transparent_huge_pages_is_aligned_to_them() {
    for transparent in [Transparent::AtOnce, Transparent::Afterwards] {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let specs = split(66 << 20, 3, backing).unwrap();
            let memory = GuestMemory::with_transparent(&specs, transparent).unwrap();
            for region in memory.regions() {
                assert_eq!(region.hva % THP_BYTES as u64, 0, "{transparent:?} {backing:?}");
                let last = (region.hva + region.spec.size - 8) as *mut u64;
                // SAFETY: inside the region, which is mapped and used by nobody else.
                unsafe { last.write_volatile(7) };
            }
            assert_eq!(memory.is_to_be_collapsed(), transparent == Transparent::Afterwards);
        }
    }
}

#[test]
fn huge_pages_back_the_memory_or_the_error_names_the_setting() {
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let specs = split(64 << 20, 2, MadeOf { backing, page_size: 2 << 20 }).unwrap();
        let memory = match GuestMemory::new(&specs) {
            Ok(memory) => memory,
            Err(error) => {
                assert!(error.to_string().contains("sysctl vm.nr_hugepages="), "{error}");
                continue;
            }
        };
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        for region in memory.regions() {
            let from = smaps.find(&format!("{:x}-{:x}", region.hva, region.hva + region.spec.size)).unwrap();
            let kernel = smaps[from..].lines().find(|line| line.starts_with("KernelPageSize:")).unwrap();
            assert!(kernel.contains("2048 kB"), "{kernel}");
        }
    }
}

#[test]
fn more_huge_pages_than_the_host_has_are_refused_with_the_setting() {
    for (backing, page_size) in [(Backing::Anonymous, 2 << 20), (Backing::Memfd, 2 << 20), (Backing::Memfd, 1 << 30)] {
        let specs = split(1 << 44, 1, MadeOf { backing, page_size }).unwrap();
        let refused = GuestMemory::new(&specs).unwrap_err();
        let MemoryError::TooFewHugePages(text) = refused else { panic!("{refused:?}") };
        assert!(text.contains("nr_hugepages") || text.contains("has no pages of"), "{text}");
    }
}

#[test]
fn more_than_the_host_has_is_refused_with_both_figures() {
    let specs = split(1 << 50, 1, Backing::Anonymous).unwrap();
    let refused = GuestMemory::new(&specs).unwrap_err();
    assert!(matches!(refused, MemoryError::TooLittle { asked, available } if asked == 1 << 50 && available > 0));
}

#[test]
fn addresses_are_found_across_the_hole() {
    let regions =
        [MappedRegion { gpa: 0, hva: 0x1000, size: 0x2000 }, MappedRegion { gpa: 0x10000, hva: 0x9000, size: 0x1000 }];
    assert_eq!(hva_of(&regions, 0x1fff), Some(0x2fff));
    assert_eq!(hva_of(&regions, 0x2000), None);
    assert_eq!(hva_of(&regions, 0x10000), Some(0x9000));
}
