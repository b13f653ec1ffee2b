use std::path::PathBuf;
use std::time::Instant;

use vmferry_patience::patient;

use super::*;

/// Descriptors of this process that show a file.
fn holders(file: &Path) -> usize {
    let links = std::fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| entry.ok()?.path().read_link().ok());
    links.filter(|link| link == file).count()
}

fn until(what: &str, wanted: impl Fn() -> bool) {
    let began = Instant::now();
    while !wanted() {
        assert!(began.elapsed() < patient(20.0), "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn empty_file() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("cpu_dma_latency");
    File::create(&file).unwrap();
    (directory, file)
}

#[test]
fn processors_are_awake_while_somebody_waits_for_pages_and_sleep_behind_it() {
    let (_directory, file) = empty_file();
    let cpu_latency = CpuLatencyRequest::by(Some(&file));
    for _ in 0..3 {
        until("held while asked", || {
            cpu_latency.renew();
            holders(&file) == 1
        });
        until("given up in a lull", || holders(&file) == 0);
    }
    assert_eq!(std::fs::read(&file).unwrap(), 0i32.to_ne_bytes());
}

#[test]
fn the_request_ends_with_its_maker() {
    let (_directory, file) = empty_file();
    let cpu_latency = CpuLatencyRequest::by(Some(&file));
    until("held", || {
        cpu_latency.renew();
        holders(&file) == 1
    });
    let state = Arc::downgrade(&cpu_latency.state);
    drop(cpu_latency);
    until("the keeper has ended", || state.strong_count() == 0);
    assert_eq!(holders(&file), 0);
}

#[test]
fn where_it_may_not_or_is_not_wanted_nobody_is_in_the_way() {
    let (directory, _) = empty_file();
    let cpu_latency = CpuLatencyRequest::by(Some(&directory.path().join("missing")));
    cpu_latency.renew();
    until("the keeper gave up", || Arc::strong_count(&cpu_latency.state) == 1);
    cpu_latency.renew();
    assert!(CpuLatencyRequest::new(false).holder.is_none());
}
