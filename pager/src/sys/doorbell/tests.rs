use super::*;
use crate::sys::memfd::memfd;

#[test]
fn an_adopted_one_rings_and_never_blocks() {
    let good = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let blocking = eventfd(0, EventfdFlags::empty()).unwrap();
    let file = memfd("no doorbell", 0).unwrap();
    assert!(Doorbell::adopt(blocking).unwrap_err().to_string().contains("EFD_NONBLOCK"));
    assert_eq!(Doorbell::adopt(file).unwrap_err(), DoorbellError::NoEventfd);
    let doorbell = Doorbell::adopt(good).unwrap();
    let full = u64::MAX - 1;
    assert_eq!(rustix::io::write(&doorbell, &full.to_ne_bytes()).unwrap(), 8);
    doorbell.ring();
    let mut rings = [0; 8];
    assert_eq!(rustix::io::read(&doorbell, &mut rings).unwrap(), 8);
    assert_eq!(u64::from_ne_bytes(rings), full);
}
