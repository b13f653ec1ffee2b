use super::*;

#[test]
fn a_claimed_page_is_nobody_elses() {
    let memory = GuestMemory::new(&split(48 << 20, 1, Backing::Anonymous).unwrap()).unwrap();
    let (_uffd, installer) = match watch(&memory.regions()[0]) {
        Ok(made) => made,
        Err(error) => return println!("SKIPPED: userfaultfd: {error}"),
    };
    let claimed = (0..4).map(|_| AtomicBool::new(false)).collect();
    let here = Destination { hva: 0x1000, installer, claimed, mirror: Vec::new(), handler_ns: AtomicU64::new(0) };
    assert_eq!([1, 1, 2, 1].map(|page| here.claim(page)), [true, false, true, false]);
    assert_eq!(here.address(2), 0x3000);
}
