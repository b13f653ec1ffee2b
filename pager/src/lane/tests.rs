use std::os::fd::AsFd;

use super::*;

pub(crate) fn congestion_control_of(socket: &impl AsFd) -> String {
    rustix::net::sockopt::tcp_congestion(socket).unwrap()
}

#[test]
fn accepted_connections_use_the_wanted_congestion_control_or_the_hosts() {
    let accepted = |wanted: &str| {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        set_congestion_control(&listener, wanted);
        let _other = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        congestion_control_of(&listener.accept().unwrap().0)
    };
    // Every kernel has this one.
    assert_eq!(accepted("reno"), "reno");
    assert_eq!(accepted("no-such-way"), accepted(""));
}
