use super::*;

const FOREVER: u64 = u32::MAX as u64;

#[test]
fn a_call_with_a_time_limit_is_disturbed_most() {
    assert_eq!(disturbance(libc::SYS_ppoll, &[0; 6]), Disturbance::None);
    assert_eq!(disturbance(libc::SYS_epoll_wait, &[1, 2, 3, FOREVER]), Disturbance::BegunAnew);
    assert_eq!(disturbance(libc::SYS_epoll_wait, &[1, 2, 3, 1000]), Disturbance::WaitsLonger);
    assert_eq!(disturbance(libc::SYS_rt_sigtimedwait, &[1, 2, 0]), Disturbance::BegunAnew);
    assert_eq!(disturbance(libc::SYS_rt_sigtimedwait, &[1, 2, 4096]), Disturbance::WaitsLonger);
}

#[test]
fn closing_a_file_is_never_begun_anew() {
    // A second close(2) would close another file.
    assert_eq!(disturbance(libc::SYS_close, &[]), Disturbance::None);
}
