use super::*;

#[test]
fn only_a_thread_inside_goes_to_the_abort_handler() {
    let sequence = Sequence { start: 100, size: 10, abort: 500 };
    let resumed = [99, 100, 109, 110].map(|ip| sequence.resumes_at(ip));
    assert_eq!(resumed, [99, 500, 500, 110]);
}
