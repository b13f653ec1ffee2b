use super::*;

#[test]
fn the_latest_of_all_cpus_counts() {
    let ms = Duration::from_millis;
    let mut all = Lateness { real_time: true, ..Lateness::default() };
    all.add(&[ms(0), ms(3), ms(1)], true);
    all.add(&[ms(2)], false);
    all.add(&[], true);
    assert_eq!(all, Lateness { longest_ms: 3.0, over_1_ms: 2, ..Lateness::default() });
}

#[test]
fn every_cpu_is_looked_at() {
    let all = measure(1).unwrap();
    assert_eq!(all.cpus, thread::available_parallelism().unwrap().get());
    assert!(all.longest_ms > 0.0);
}
