use proptest::prelude::*;

use super::*;

#[test]
fn without_a_limit_nothing_waits() {
    let now = Instant::now();
    let mut bucket = TokenBucket::new(0, now);
    assert!((0..1000).all(|_| bucket.take(u64::MAX / 2, now).is_zero()));
}

#[test]
fn a_new_rate_holds_at_once() {
    let now = Instant::now();
    let mut bucket = TokenBucket::new(1, now);
    bucket.take(1 << 20, now);
    assert!(bucket.take(1, now) > Duration::from_secs(1 << 19));
    bucket.set_rate(1 << 30, now);
    assert!(bucket.take(1, now).is_zero());
    bucket.set_rate(0, now);
    assert!(bucket.take(1 << 40, now).is_zero());
}

#[test]
fn bytes_that_were_not_sent_are_not_counted() {
    let now = Instant::now();
    let mut bucket = TokenBucket::new(1, now);
    for _ in 0..1000 {
        assert!(bucket.take(1 << 18, now).is_zero());
        bucket.give_back(1 << 18);
    }
    bucket.take(10, now);
    bucket.give_back(4);
    assert_eq!(bucket.take(1, now), Duration::from_secs(6));
}

proptest! {
    /// A lane that waits as told never sends more than the rate and a burst, and loses nothing but the burst.
    #[test]
    fn the_rate_is_kept(rate in 1u64..1 << 34, chunks in prop::collection::vec((1u64..1 << 20, 0u64..50_000), 1..200)) {
        let start = Instant::now();
        let mut now = start;
        let mut bucket = TokenBucket::new(rate, start);
        let (mut sent, mut last) = (0, 0);
        for (bytes, pause_us) in chunks {
            now += Duration::from_micros(pause_us);
            let wait = bucket.take(bytes, now);
            now += wait;
            let elapsed = (now - start) + BURST + Duration::from_micros(1);
            prop_assert!(sent as f64 <= rate as f64 * elapsed.as_secs_f64(), "before the chunk is sent");
            if !wait.is_zero() {
                prop_assert!(wait.as_secs_f64() <= last as f64 / rate as f64 + 1e-6, "no longer than the chunk before takes");
            }
            sent += bytes;
            last = bytes;
        }
    }
}
