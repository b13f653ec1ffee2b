use super::*;

#[test]
fn a_process_is_named_by_its_start() {
    assert!(process_started(std::process::id()) > 0);
    assert_eq!(process_started(u32::MAX), 0);
}
