use super::*;

/// From a frame to the rest behind it, frames being a tenth of a millisecond apart.
fn work(throttle: &mut RtThrottle, now: &mut Instant, faults: bool) -> Duration {
    let began = *now;
    for _ in 1..1000 {
        if faults {
            throttle.note_fault(*now);
        }
        if throttle.pause_due(*now) {
            return *now - began;
        }
        *now += Duration::from_micros(100);
    }
    panic!("it never rests");
}

#[test]
fn it_pauses_often_while_the_guest_faults_and_seldom_otherwise() {
    let (mut throttle, mut now) = (RtThrottle::default(), Instant::now());
    assert_eq!(work(&mut throttle, &mut now, false), RUN_TIME_QUIET_GUEST);
    assert_eq!(work(&mut throttle, &mut now, true), RUN_TIME);
    assert_eq!(work(&mut throttle, &mut now, false), RUN_TIME, "it faulted a moment ago");
    now += QUIET_AFTER;
    assert_eq!(work(&mut throttle, &mut now, false), RUN_TIME_QUIET_GUEST);
}

#[test]
fn sleep_is_no_work_and_enough_of_it_is_a_rest() {
    for (sleep, frames_to_a_rest) in [(PAUSE / 3, Some(6)), (PAUSE, None)] {
        let (mut throttle, mut now) = (RtThrottle::default(), Instant::now());
        let mut frames = (1..1000).map(|frame| {
            throttle.note_fault(now);
            let rest = throttle.pause_due(now);
            now += Duration::from_micros(100);
            throttle.note_sleep(sleep);
            now += sleep;
            (frame, rest)
        });
        let rested = frames.find(|(_, rest)| *rest).map(|(frame, _)| frame);
        assert_eq!(rested, frames_to_a_rest, "{sleep:?}");
    }
}
