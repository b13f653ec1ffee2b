//! Faults of a victim, served by hand with the pager's own code.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use vmferry_pager::internals::{Hva, UffdEvent, Userfaultfd};
use vmferry_patience::patient;

/// A userfaultfd that was handed over.
pub struct Served<'a>(pub &'a OwnedFd);

impl Served<'_> {
    fn uffd(&self) -> Userfaultfd {
        Userfaultfd::adopt(self.0.try_clone().unwrap()).unwrap()
    }

    /// The page of the next fault.
    pub fn fault(&self) -> u64 {
        let began = Instant::now();
        while began.elapsed() < patient(20.0) {
            match self.uffd().read_events().unwrap().first() {
                Some(UffdEvent::Fault { at, .. }) => return at.0 / 4096 * 4096,
                Some(other) => panic!("{other:?}"),
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        panic!("no fault came");
    }

    /// Waits for an event that a range is dropped; the thread that drops it continues.
    pub fn removal(&self) {
        let began = Instant::now();
        while began.elapsed() < patient(20.0) {
            match self.uffd().read_events().unwrap().first() {
                Some(UffdEvent::Remove { .. }) => return,
                Some(other) => panic!("{other:?}"),
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        panic!("no range is dropped");
    }

    pub fn copy(&self, page: u64, byte: u8) {
        assert_eq!(self.uffd().copy(Hva(page), &[byte; 4096]).stop, None);
    }

    pub fn poison(&self, page: u64) {
        assert_eq!(self.uffd().poison(Hva(page), 4096).stop, None);
    }
}
