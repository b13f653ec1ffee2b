use crate::sys::scheduling::current as class_of_thread;

#[test]
fn a_thread_runs_at_once_where_it_may_and_those_that_it_starts_do_not() {
    let before = class_of_thread();
    let check = move || {
        let may = super::realtime();
        let (there, child) = (class_of_thread(), std::thread::spawn(class_of_thread).join().unwrap());
        super::favoured();
        (may, there, child, class_of_thread(), std::thread::spawn(class_of_thread).join().unwrap())
    };
    let (may, there, child, after, child_after) = std::thread::spawn(check).join().unwrap();
    assert_eq!(there.0 == libc::SCHED_RR, may);
    assert_eq!((child, child_after), (before, before));
    assert_eq!(after.0, libc::SCHED_OTHER, "it stands back again");
}

#[test]
fn a_thread_stands_as_it_should_where_it_may_and_only_it() {
    let before = class_of_thread();
    let of = |enter: fn() -> bool| {
        let stand = move || {
            enter();
            class_of_thread()
        };
        std::thread::spawn(stand).join().unwrap()
    };
    let urgent = of(super::favoured);
    assert!(urgent == (libc::SCHED_OTHER, super::FAVOURED_NICE) || urgent == before, "{urgent:?}");
    let bulk = || {
        super::batch();
        true
    };
    assert_eq!(of(bulk).0, libc::SCHED_BATCH);
    assert_eq!(class_of_thread(), before);
}
