use super::*;

pub(crate) fn paced_by(socket: &impl AsRawFd) -> String {
    let mut name = [0u8; 16];
    let mut size = name.len() as libc::socklen_t;
    let (level, what) = (libc::IPPROTO_TCP, libc::TCP_CONGESTION);
    let (into, room) = (name.as_mut_ptr().cast(), &raw mut size);
    // SAFETY: the kernel writes at most as many bytes as said.
    assert_eq!(unsafe { libc::getsockopt(socket.as_raw_fd(), level, what, into, room) }, 0);
    String::from_utf8_lossy(&name).trim_end_matches('\0').to_owned()
}

#[test]
fn what_a_listener_accepts_is_paced_as_wanted_or_as_the_host_does_it() {
    let accepted = |wanted: &str| {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        Tuning { congestion_control: wanted.into(), ..Tuning::default() }.pace(&listener);
        let _other = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        paced_by(&listener.accept().unwrap().0)
    };
    // Every kernel has this one.
    assert_eq!(accepted("reno"), "reno");
    assert_eq!(accepted("no-such-way"), accepted(""));
}
