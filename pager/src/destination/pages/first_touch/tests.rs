use super::*;

#[test]
fn quantiles_are_in_microseconds() {
    let mut first_touch = FirstTouch::default();
    assert_eq!(first_touch.summary(), LatencySummary::default());
    for us in 1..=100 {
        first_touch.record(Duration::from_micros(us));
    }
    let summary = first_touch.summary();
    assert_eq!(summary.count, 100);
    assert!((summary.p50_us - 50.0).abs() < 0.5, "{summary:?}");
    assert!((summary.p99_us - 99.0).abs() < 0.5, "{summary:?}");
    assert!((summary.max_us - 100.0).abs() < 0.5, "{summary:?}");
}

#[test]
fn buckets_have_ten_bounds_a_decade_and_no_zeros_at_their_end() {
    assert_eq!(BOUNDS_NS.first(), Some(&10_000));
    assert_eq!(BOUNDS_NS.last(), Some(&10_000_000_000));
    assert!(BOUNDS_NS.is_sorted());
    let mut first_touch = FirstTouch::default();
    for us in [1, 10, 11, 20] {
        first_touch.record(Duration::from_micros(us));
    }
    let summary = first_touch.summary();
    assert_eq!(summary.buckets, [2, 1, 0, 1]);
    assert!((summary.sum_us - 42.0).abs() < 0.01, "{summary:?}");
    first_touch.record(Duration::from_secs(11));
    assert_eq!(first_touch.summary().buckets.len(), 62);
}
