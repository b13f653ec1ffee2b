//! Frames of this host that go bad under pages on their way (`make test-kernels` runs these tests).

use super::*;
use crate::destination::memory::claim::InstallMethod;
use crate::lane::frame::HEADER_BYTES;

/// Where the kernel takes numbers of frames that are to go bad (Documentation/mm/hwpoison.rst).
const CORRUPT_PFN: &str = "/sys/kernel/debug/hwpoison/corrupt-pfn";

/// Whether frames of this host may go bad; says why not.
fn frames_may_go_bad() -> bool {
    let asked = std::env::var_os("VMFERRY_TEST_HWPOISON").is_some();
    let can = std::path::Path::new(CORRUPT_PFN).exists();
    if !(asked && can) {
        println!("SKIPPED: it takes frames out of service: VMFERRY_TEST_HWPOISON=1, and modprobe hwpoison_inject");
    }
    asked && can
}

/// The frame that this process has there goes bad.
fn fail_frame(at: u64) {
    let (pagemap, mut word) = (std::fs::File::open("/proc/self/pagemap").unwrap(), [0; 8]);
    pagemap.read_exact_at(&mut word, at / PAGE_SIZE * 8).unwrap();
    let word = u64::from_ne_bytes(word);
    assert_eq!(word >> 63, 1, "{at:#x} is not present");
    std::fs::write(CORRUPT_PFN, format!("{:#x}\n", word & ((1 << 55) - 1))).unwrap();
}

impl Guest {
    /// The frame of a page in the receive mapping goes bad.
    fn fail(&self, page: u64) {
        let pages = PageRun { region: 0, page, count: 1 };
        let mut resolver = self.shared.lock();
        let claim = resolver.claim_in_place(pages, LaneKind::Bulk).unwrap();
        let address = address_of(&claim);
        resolver.finish_claim(&claim);
        fail_frame(address);
    }
}

/// The address of the first page of a claim in the receive mapping.
fn address_of(claim: &Claim) -> u64 {
    let InstallMethod::Received(receive_mapping, first) = claim.method() else { panic!("{claim:?}") };
    receive_mapping.ready(*first, 1).unwrap().address()
}

fn pushed(first: u64, count: u64) -> Vec<u8> {
    let mut frame =
        FrameHeader { kind: FrameKind::Data, region: 0, page: first, count: count as u32 }.encode().to_vec();
    (first..first + count).for_each(|page| frame.extend([page as u8 + 1; PAGE_SIZE as usize]));
    frame
}

#[test]
fn a_frame_that_went_bad_before_its_page_was_received_is_replaced() {
    if !frames_may_go_bad() {
        return;
    }
    for bad in [&[0][..], &[7], &[0, 3, 4, 7], &[1, 6]] {
        let Some(guest) = Guest::new() else { return };
        bad.iter().for_each(|page| guest.fail(*page));
        let (mut source, mut receiver) = lane(LaneKind::Bulk);
        source.write_all(&pushed(0, PAGES)).unwrap();
        take(&mut receiver, &guest.shared);
        while guest.states().contains(&PageState::Absent) {
            take(&mut receiver, &guest.shared);
        }
        assert_eq!(guest.states(), [PageState::PresentPush; PAGES as usize]);
        (0..PAGES).for_each(|page| assert_eq!(guest.byte(page), Some(page as u8 + 1), "{bad:?}"));
    }
}

#[test]
fn a_frame_that_went_bad_before_its_page_was_written_is_replaced() {
    if !frames_may_go_bad() {
        return;
    }
    let Some(guest) = Guest::new() else { return };
    [2, 3, 5].iter().for_each(|page| guest.fail(*page));
    let pages = PageRun { region: 0, page: 2, count: 4 };
    let mut claim = guest.shared.lock().claim(pages, LaneKind::Urgent).unwrap();
    assert_eq!(guest.shared.install(&mut claim, &pushed(2, 4)[HEADER_BYTES..]), None);
    assert_eq!([2, 3, 4, 5].map(|page| guest.byte(page)), [Some(3), Some(4), Some(5), Some(6)]);
}

#[test]
fn a_frame_that_goes_bad_before_its_page_is_mapped_is_poison() {
    if !frames_may_go_bad() {
        return;
    }
    let Some(guest) = Guest::new() else { return };
    let pages = PageRun { region: 0, page: 2, count: 3 };
    let mut claim = guest.shared.lock().claim_in_place(pages, LaneKind::Bulk).unwrap();
    assert_eq!(claim.write(&[]), None);
    guest.shared.lock().mark_arrived(&claim);
    fail_frame(address_of(&claim) + PAGE_SIZE);
    assert_eq!(claim.install(&[]), None);
    guest.shared.finish(&claim);
    assert_eq!([2, 3, 4].map(|page| guest.byte(page).is_some()), [true, false, true]);
    assert_eq!(guest.states()[3], PageState::PoisonedTold);
    let events = guest.shared.lock().events().after(0);
    assert_eq!(events.len(), 1);
}

#[test]
fn a_frame_that_went_bad_under_zeros_that_a_vcpu_waits_for_is_replaced() {
    if !frames_may_go_bad() {
        return;
    }
    let Some(guest) = Guest::new() else { return };
    guest.fail(4);
    let at = guest.memory.at(4 * PAGE_SIZE);
    std::thread::scope(|scope| {
        let touch = scope.spawn(|| byte_at(at));
        let (fault, thread, minor) = guest.next_fault();
        assert!(matches!(guest.shared.lock().fault(fault, thread, minor), FaultOutcome::Ask(PageIndex(4))));
        assert_eq!(guest.shared.lock().zeros(PageRun { region: 0, page: 4, count: 1 }, LaneKind::Urgent), None);
        assert_eq!(touch.join().unwrap(), Some(0));
    });
}
