use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use super::*;

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (one, listener.accept().unwrap().0)
}

fn get(socket: &impl AsRawFd, level: libc::c_int, what: libc::c_int) -> libc::c_int {
    let (mut value, mut size) = (0 as libc::c_int, size_of::<libc::c_int>() as libc::socklen_t);
    // SAFETY: an int to write to.
    let told = unsafe { libc::getsockopt(socket.as_raw_fd(), level, what, (&raw mut value).cast(), &raw mut size) };
    assert_eq!(told, 0);
    value
}

#[test]
fn info_tells_of_the_bytes_that_were_acknowledged() {
    let (mut one, mut other) = pair();
    one.write_all(&[7; 1000]).unwrap();
    let mut read = [0; 1000];
    other.read_exact(&mut read).unwrap();
    other.write_all(&[7]).unwrap();
    one.read_exact(&mut read[..1]).unwrap();
    let info = TcpInfo::of(&one).unwrap().unwrap();
    assert_eq!(info.bytes_acked, 1001);
    assert_eq!((info.bytes_unsent, info.segments_unacked), (0, 0));
    assert!(info.min_rtt > Duration::ZERO && info.min_rtt <= Duration::from_secs(1), "{info:?}");
    assert!(info.mss >= 536, "{info:?}");
}

#[test]
fn options_keep_their_values() {
    let (one, _other) = pair();
    set_user_timeout(&one, Duration::from_millis(2500)).unwrap();
    assert_eq!(get(&one, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT), 2500);
    set_keepalive(&one, Duration::from_secs(7)).unwrap();
    assert_eq!(get(&one, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE), 7);
    assert_eq!(get(&one, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL), 7);
    set_interactive(&one).unwrap();
    assert_eq!(get(&one, libc::SOL_SOCKET, libc::SO_PRIORITY), 6);
    if set_rto_max(&one, Duration::from_secs(3)).is_ok() {
        assert_eq!(get(&one, libc::IPPROTO_TCP, TCP_RTO_MAX_MS), 3000);
    }
}

#[test]
fn a_pace_holds() {
    let (mut one, mut other) = pair();
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        other.read_to_end(&mut all).map(|_| all.len())
    });
    set_max_pacing_rate(&one, Some(16 << 20)).unwrap();
    let began = Instant::now();
    one.write_all(&vec![1; 8 << 20]).unwrap();
    drop(one);
    assert_eq!(reader.join().unwrap().unwrap(), 8 << 20);
    // Half a second; the first ten segments go at once.
    assert!(began.elapsed() >= Duration::from_millis(250), "{:?}", began.elapsed());
}
