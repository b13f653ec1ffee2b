use super::*;
use proptest::prelude::*;

const STATES: [VmState; 6] =
    [VmState::Running, VmState::Stopped, VmState::Incoming, VmState::Prepared, VmState::Loaded, VmState::Gone];

#[test]
fn a_refusal_names_the_actual_and_the_required_state() {
    let Decision::Refuse(text) = decide(VmState::Incoming, Verb::AttachMemory) else { panic!() };
    assert_eq!(text, "attach_memory needs a VM that is running or stopped; this one is incoming");
}

#[test]
fn a_destination_never_runs_before_its_state_is_loaded() {
    for state in [VmState::Incoming, VmState::Prepared, VmState::Gone, VmState::Stopped] {
        assert!(matches!(decide(state, Verb::Start), Decision::Refuse(_)), "{state}");
    }
}

#[test]
fn a_vm_that_moved_away_comes_back_by_no_request() {
    for verb in Verb::ALL {
        assert_ne!(decide(VmState::Gone, verb), Decision::Do, "{}", verb.name());
    }
}

proptest! {
    #[test]
    fn whatever_was_done_is_done_when_asked_again(verbs in proptest::collection::vec(0usize..10, 0..60), start in 0usize..6) {
        let mut state = STATES[start];
        for verb in verbs.into_iter().map(|i| Verb::ALL[i]) {
            if decide(state, verb) == Decision::Do {
                let after = verb.end_state().unwrap_or(state);
                prop_assert!(!matches!(decide(after, verb), Decision::Refuse(_)));
                state = after;
            }
        }
    }
}
