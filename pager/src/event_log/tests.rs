use super::*;
use crate::proto::AllPresentEvent;

fn numbers(events: &[PagerEvent]) -> Vec<u64> {
    events.iter().map(|e| e.number).collect()
}

#[test]
fn events_are_kept_until_acknowledged() {
    let log = EventLog::default();
    let mut watch = log.watch();
    for expected in 1..=4 {
        assert_eq!(log.append(Event::AllPresent(AllPresentEvent {})), expected);
    }
    assert!(watch.has_changed().unwrap());
    assert_eq!(*watch.borrow_and_update(), 4);
    log.wake_watchers();
    assert!(!watch.has_changed().unwrap(), "there is nothing new");
    assert_eq!(numbers(&log.after(0)), [1, 2, 3, 4]);
    log.acknowledge(2);
    assert_eq!(numbers(&log.after(0)), [3, 4]);
    assert_eq!(numbers(&log.after(3)), [4]);
    log.acknowledge(100);
    assert!(log.after(0).is_empty());
    assert_eq!(log.append_quietly(Event::AllPresent(AllPresentEvent {})), 5);
    assert_eq!(numbers(&log.after(0)), [5]);
    assert!(!watch.has_changed().unwrap());
    log.wake_watchers();
    assert_eq!(*watch.borrow_and_update(), 5);
}
