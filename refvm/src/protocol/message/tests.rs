use super::*;
use proptest::prelude::*;

fn refused(message: Value) -> (Option<u64>, String) {
    let bad = FromDaemon::parse(message.to_string().as_bytes()).unwrap_err();
    (bad.id, bad.field)
}

fn good_prepare() -> Value {
    json!({"type": "prepare", "id": 3, "vcpus": 2, "uffd_features": ["UFFD_FEATURE_POISON"], "socket": "/s",
           "later": true, "regions": [{"gpa": 0, "size": 8192, "page_size": 4096, "backing": "memfd", "new": 1}]})
}

#[test]
fn unknown_fields_are_ignored() {
    let FromDaemon::Request(3, Request::Prepare(found)) =
        FromDaemon::parse(good_prepare().to_string().as_bytes()).unwrap()
    else {
        panic!()
    };
    assert_eq!((found.vcpus, found.regions[0].backing), (2, Backing::Memfd));
}

#[test]
fn whatever_is_wrong_is_named() {
    assert_eq!(FromDaemon::parse(b"\xff{").unwrap_err().field, "");
    assert_eq!(refused(json!([1])), (None, String::new()));
    assert_eq!(refused(json!({})), (None, "type".into()));
    assert_eq!(refused(json!({"type": "stop"})), (None, "id".into()));
    assert_eq!(refused(json!({"type": "stop", "id": -1})), (None, "id".into()));
    assert_eq!(refused(json!({"type": "dance", "id": 1})), (Some(1), "type".into()));
    assert_eq!(refused(json!({"type": "welcome", "version": 2})), (None, "version".into()));
    assert_eq!(refused(json!({"type": "load_state", "id": 1, "state": "%"})), (Some(1), "state".into()));
    assert_eq!(refused(json!({"type": "migration_complete", "id": 1, "keep_uffd": 0})).1, "keep_uffd");
    for (pointer, value, field) in [
        ("/vcpus", json!(0), "vcpus"),
        ("/uffd_features/0", json!(1), "uffd_features[0]"),
        ("/regions/0/gpa", json!("0"), "regions[0].gpa"),
        ("/regions/0/size", json!(-4096), "regions[0].size"),
        ("/regions/0/backing", json!("file"), "regions[0].backing"),
        ("/regions/0", json!(7), "regions[0]"),
    ] {
        let mut message = good_prepare();
        *message.pointer_mut(pointer).unwrap() = value;
        assert_eq!(refused(message), (Some(3), field.into()));
    }
}

#[test]
fn a_pager_is_understood() {
    let parse = |value: Value| FromPager::parse(value.to_string().as_bytes());
    assert_eq!(parse(json!({"type": "attached", "version": 1})), Ok(FromPager::Attached));
    let error = json!({"type": "memory_error", "gpa": 4096, "severity": "AR", "thread": 7});
    assert_eq!(parse(error), Ok(FromPager::MemoryError(Poisoned { block: Block::page(4096), waits: Some(7) })));
    let huge = json!({"type": "memory_error", "gpa": 0x20_1000, "lsb": 21, "severity": "AO"});
    let block = Block { gpa: 0x20_0000, lsb: 21 };
    assert_eq!(parse(huge), Ok(FromPager::MemoryError(Poisoned { block, waits: None })));
    for (field, value) in [("thread", json!(-1)), ("severity", json!("?")), ("lsb", json!(64)), ("gpa", json!(-1))] {
        let mut error = json!({"type": "memory_error", "gpa": 0, "lsb": 12, "severity": "AR", "thread": 7});
        error[field] = value;
        assert_eq!(parse(error).unwrap_err().field, field);
    }
}

proptest! {
    #[test]
    fn no_bytes_make_the_parsers_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = (FromDaemon::parse(&bytes), FromPager::parse(&bytes));
    }

    #[test]
    fn every_state_survives_the_message(state in proptest::collection::vec(any::<u8>(), 0..200)) {
        let message = json!({"type": "load_state", "id": 9, "state": encode_state(&state)});
        let found = FromDaemon::parse(message.to_string().as_bytes()).unwrap();
        prop_assert_eq!(found, FromDaemon::Request(9, Request::LoadState { state }));
    }
}
