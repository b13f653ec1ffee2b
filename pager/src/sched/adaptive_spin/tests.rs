use super::*;

const LONGEST: Duration = Duration::from_micros(50);

/// One wait in which nothing is found: how many looks.
fn in_vain(spin: &mut AdaptiveSpin, now: &mut Instant) -> u32 {
    let mut looks = 0;
    while spin.should_spin(*now) {
        looks += 1;
        *now += Duration::from_micros(1);
    }
    looks
}

#[test]
fn it_looks_for_as_long_as_it_may() {
    let mut now = Instant::now();
    assert_eq!(in_vain(&mut AdaptiveSpin::new(LONGEST), &mut now), 50);
    assert_eq!(in_vain(&mut AdaptiveSpin::new(Duration::ZERO), &mut now), 0);
}

#[test]
fn where_nothing_is_ever_found_it_hardly_tries_and_it_comes_back() {
    let (mut now, mut spin) = (Instant::now(), AdaptiveSpin::new(LONGEST));
    (0..100).for_each(|_| _ = in_vain(&mut spin, &mut now));
    let tried = (0..160).filter(|_| in_vain(&mut spin, &mut now) > 0).count();
    assert_eq!(tried, 10);
    for _ in 0..320 {
        if spin.should_spin(now) {
            spin.found_work();
        }
    }
    assert!((0..10).all(|_| {
        let worth = spin.should_spin(now);
        spin.found_work();
        worth
    }));
}
