use super::*;

fn owned(fd: RawFd) -> OwnedFd {
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: a new descriptor that nobody else owns.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[test]
fn an_adopted_one_rings_and_never_blocks() {
    // SAFETY: take numbers or a literal name.
    let (good, blocking, file) = unsafe {
        (
            owned(libc::eventfd(0, libc::EFD_NONBLOCK)),
            owned(libc::eventfd(0, 0)),
            owned(libc::memfd_create(c"no doorbell".as_ptr(), 0)),
        )
    };
    assert!(Doorbell::adopt(blocking).unwrap_err().to_string().contains("EFD_NONBLOCK"));
    assert_eq!(Doorbell::adopt(file).unwrap_err(), DoorbellError::NoEventfd);
    let doorbell = Doorbell::adopt(good).unwrap();
    let full = u64::MAX - 1;
    // SAFETY: eight bytes.
    assert_eq!(unsafe { libc::write(doorbell.as_raw_fd(), (&raw const full).cast(), 8) }, 8);
    doorbell.ring();
    let mut rings = 0u64;
    // SAFETY: room for eight bytes.
    assert_eq!(unsafe { libc::read(doorbell.as_raw_fd(), (&raw mut rings).cast(), 8) }, 8);
    assert_eq!(rings, full);
}
