use super::*;

#[test]
fn lists_of_cpus_are_read_or_refused_in_words() {
    let list = |text: &str| text.parse::<CpuSet>().map(|list| list.0);
    assert_eq!(list(""), Ok(vec![]));
    assert_eq!(list("2-4, 7"), Ok(vec![2, 3, 4, 7]));
    for (text, word) in
        [("x", "no CPU"), ("3-1", "ends before"), ("1-", "no CPU"), ("99999", "no CPU"), ("1,,2", "no CPU")]
    {
        assert!(list(text).unwrap_err().to_string().contains(word), "{text}");
    }
}

#[test]
fn only_cpus_that_are_allowed_are_named() {
    let all = CpuSet::each_allowed();
    assert_eq!(all.len(), std::thread::available_parallelism().unwrap().get());
    let last = all.last().unwrap().clone();
    let there = std::thread::spawn(move || {
        last.pin();
        (CpuSet::each_allowed(), last)
    });
    let (allowed, last) = there.join().unwrap();
    assert_eq!(allowed, [last]);
}

#[test]
fn a_placed_thread_runs_there_and_only_it() {
    let on = |cpus: &str| {
        let list: CpuSet = cpus.parse().unwrap();
        std::thread::spawn(move || {
            list.pin();
            CpuSet::each_allowed().len()
        })
        .join()
        .unwrap()
    };
    assert_eq!(on("0"), 1);
    assert_eq!(on(""), std::thread::available_parallelism().unwrap().get());
}
