//! Victims asleep in a system call: the call continues for the time that is left, and reports nothing.

use std::path::Path;

use vmferry_reach::proto::ReachErrorCode;

use crate::rig::{Answer, Victim, linked, probe};

/// Time limits of calls that have one. The next is tried where this machine is so slow that the call ends before a probe.
const LIMITS_MS: [u32; 3] = [1000, 8000, 64_000];

/// Probes a victim that sleeps in a call; returns how many milliseconds longer than its limit the call took.
fn assert_sleeps_on(program: &Path, call: &str) -> f64 {
    for limit in LIMITS_MS {
        let victim = Victim::start_program(program, &["asleep", call, &limit.to_string()]).until_asleep();
        let probes = (0..3).map(|_| probe(&victim)).take_while(|answer| !is_gone(answer)).count();
        let longer = victim.assert_undisturbed() - f64::from(limit);
        if probes > 0 {
            return longer;
        }
    }
    panic!("{call} always ends before a probe");
}

fn is_gone(answer: &Answer) -> bool {
    answer.error().map(|(code, error)| assert_eq!(code, ReachErrorCode::Gone, "{}", error.message)).is_some()
}

#[test]
fn calls_without_a_time_limit_continue() {
    for program in linked() {
        for call in ["read", "ppoll", "epoll", "epoll-pwait"] {
            assert_sleeps_on(program, call);
        }
    }
}

#[test]
fn calls_with_a_time_limit_end_at_its_end_and_no_sooner() {
    for program in linked() {
        for call in ["poll", "ppoll-limit", "nanosleep", "futex"] {
            let longer = assert_sleeps_on(program, call);
            assert!(longer >= 0.0, "{} {call} ended {} ms too soon", program.display(), -longer);
        }
    }
}

#[test]
fn calls_that_report_any_interruption_are_begun_anew() {
    for call in ["epoll-limit", "sigtimedwait", "recv-limit"] {
        let longer = assert_sleeps_on(linked()[0], call);
        assert!(longer >= 0.0, "{call} ended {} ms too soon", -longer);
    }
}
