use super::*;
use vmferry_refvm::layout::split;
use vmferry_refvm::memory::GuestMemory;

#[test]
fn an_installed_page_of_either_backing_reads_as_its_contents() {
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let memory = GuestMemory::new(&split(48 << 20, 1, backing).unwrap()).unwrap();
        let region = &memory.regions()[0];
        let (uffd, installer) = match watch(region) {
            Ok(made) => made,
            Err(error) => return println!("SKIPPED: userfaultfd: {error}"),
        };
        let at = region.hva + 5 * PAGE;
        let reader = std::thread::spawn(move || {
            // SAFETY: a word of the mapping, which outlives the thread.
            unsafe { (at as *const u64).read_volatile() }
        });
        assert_eq!(next_fault(uffd.as_raw_fd()).unwrap(), at);
        let mut buffer = vec![0; PAGE as usize];
        let room = installer.room(at, &mut buffer);
        room[..8].copy_from_slice(&42u64.to_le_bytes());
        installer.install(at, room, false).unwrap();
        installer.wake(at).unwrap();
        assert_eq!(reader.join().unwrap(), 42);
        assert_eq!(installer.install(at, room, true).unwrap_err().raw_os_error(), Some(libc::EEXIST));
    }
}
