use super::*;

const STEP: Duration = Duration::from_millis(1);

/// Works for so many percent of so many windows.
fn work(load: &mut PushLoad, (now, worked): &mut (Instant, Duration), percent: u32, windows: u32) -> bool {
    let mut heavy = true;
    for _ in 0..windows * 50 {
        *now += STEP;
        *worked += STEP * percent / 100;
        heavy = load.is_heavy(*now, *worked);
    }
    heavy
}

#[test]
fn it_is_heavy_until_it_has_been_watched() {
    let (now, before) = (Instant::now(), Duration::from_secs(7));
    let mut load = PushLoad::new(now, before);
    assert!(load.is_heavy(now + WINDOW - STEP, before));
    assert!(!load.is_heavy(now + WINDOW, before));
}

#[test]
fn it_changes_only_where_it_has_changed_much() {
    let mut at = (Instant::now(), Duration::ZERO);
    let mut load = PushLoad::new(at.0, at.1);
    let courses = [(50, true), (44, false), (59, false), (60, true), (46, true), (100, true), (0, false), (250, true)];
    for (percent, heavy) in courses {
        assert_eq!(work(&mut load, &mut at, percent, 2), heavy, "{percent} %");
    }
}
