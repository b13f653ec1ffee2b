//! Victims with seccomp filters: none is harmed by a call that its filter does not let through.

use vmferry_reach::proto::{ReachErrorCode, SeccompPolicy};

use crate::rig::{Named, Victim, is_root, probing, reach};

/// What a victim needs that only waits; getpid(2) is not among it.
const WAITS: [i64; 5] =
    [libc::SYS_read, libc::SYS_write, libc::SYS_exit_group, libc::SYS_restart_syscall, libc::SYS_rt_sigaction];

fn victim(mode: &str, action: &str, calls: &[i64]) -> Victim {
    let numbers: Vec<_> = calls.iter().map(i64::to_string).collect();
    let arguments: Vec<_> = [mode, action].into_iter().chain(numbers.iter().map(String::as_str)).collect();
    Victim::start(&arguments).until_asleep()
}

#[test]
fn a_call_that_the_filter_would_kill_for_is_not_run() {
    for action in ["kill", "trap", "errno"] {
        for victim in [victim("deny", action, &[libc::SYS_getpid]), victim("allow", action, &WAITS)] {
            let answer = reach(&Named::of_victim(&victim), probing(SeccompPolicy::Unspecified));
            let error = answer.assert_error(ReachErrorCode::Seccomp);
            let names_action =
                ["KILL_PROCESS", "TRAP", "ERRNO", "cannot be read"].iter().any(|name| error.message.contains(name));
            assert!(names_action, "{}", error.message);
            assert_eq!(answer.reply.calls, []);
            victim.assert_undisturbed();
        }
    }
}

#[test]
fn a_filter_that_lets_the_call_through_is_no_obstacle() {
    if !is_root("a_filter_that_lets_the_call_through_is_no_obstacle") {
        return;
    }
    for victim in [
        victim("deny", "kill", &[libc::SYS_fork, libc::SYS_setuid]),
        victim("allow", "kill", &[WAITS.as_slice(), &[libc::SYS_getpid]].concat()),
    ] {
        reach(&Named::of_victim(&victim), probing(SeccompPolicy::Unspecified)).assert_done();
        victim.assert_undisturbed();
    }
}

#[test]
fn an_allow_list_is_suspended_for_the_call_alone() {
    if !is_root("an_allow_list_is_suspended_for_the_call_alone") {
        return;
    }
    let victim = victim("allow", "kill", &WAITS);
    for _ in 0..3 {
        reach(&Named::of_victim(&victim), probing(SeccompPolicy::Suspend)).assert_done();
    }
    let answer = reach(&Named::of_victim(&victim), probing(SeccompPolicy::Unspecified));
    answer.assert_error(ReachErrorCode::Seccomp);
    victim.assert_undisturbed();
}

#[test]
fn the_signal_of_a_trusted_filter_that_traps_does_not_reach_the_process() {
    let victim = victim("deny", "trap", &[libc::SYS_getpid]);
    for _ in 0..3 {
        let answer = reach(&Named::of_victim(&victim), probing(SeccompPolicy::Trust));
        assert!(answer.assert_error(ReachErrorCode::Seccomp).message.contains("TRAP"));
    }
    victim.assert_undisturbed();
}

#[test]
fn a_trusted_filter_that_refuses_by_errno_is_the_kernels_refusal() {
    let victim = victim("deny", "errno", &[libc::SYS_getpid]);
    let answer = reach(&Named::of_victim(&victim), probing(SeccompPolicy::Trust));
    assert_eq!(answer.assert_error(ReachErrorCode::Call).errno, Some(libc::EPERM.cast_unsigned()));
    victim.assert_undisturbed();
}

#[test]
fn strict_mode_is_refused_even_where_trusted() {
    let victim = Victim::start(&["strict"]).until_asleep();
    for policy in [SeccompPolicy::Unspecified, SeccompPolicy::Trust] {
        reach(&Named::of_victim(&victim), probing(policy)).assert_error(ReachErrorCode::Seccomp);
    }
    if is_root("strict_mode_is_refused_even_where_trusted, suspended") {
        reach(&Named::of_victim(&victim), probing(SeccompPolicy::Suspend)).assert_done();
    }
    victim.assert_undisturbed();
}
