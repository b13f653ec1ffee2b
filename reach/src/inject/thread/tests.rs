use super::*;

const EPOLL: &str = "232 0x4 0x7ffd 0x8 0xffffffff 0x0 0x8 0x7ffd01 0x7f02";
const EPOLL_SECOND: &str = "232 0x4 0x7ffd 0x8 0x3e8 0x0 0x8 0x7ffd01 0x7f02";

#[test]
fn the_thread_that_notices_least_comes_first() {
    let seen = [('D', EPOLL), ('S', EPOLL_SECOND), ('R', "running"), ('S', EPOLL), ('S', "271 0x0 0x0"), ('Z', "")];
    let mut order: Vec<_> = seen.iter().filter_map(|(state, call)| suitability(*state, call)).collect();
    order.sort_unstable();
    use Suitability::{Asleep, BegunAnew, Running, Uninterruptible, WaitsLonger};
    assert_eq!(order, [Asleep, BegunAnew, Running, WaitsLonger, Uninterruptible]);
}

#[test]
fn a_thread_blocked_outside_a_call_is_not_taken_for_asleep_in_one() {
    assert_eq!(suitability('S', "-1 0x7ffd 0x7f02"), Some(Suitability::Running));
    assert_eq!(suitability('S', ""), Some(Suitability::Running));
}
