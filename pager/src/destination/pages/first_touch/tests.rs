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
