use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::layout::{Gpa, Region};

fn expected(destination: bool) -> Expected {
    let region = |gpa, backing| Region { gpa: Gpa(gpa), size: 0x4000, page_size: 4096, backing };
    let layout = MemoryLayout::new(vec![region(0, Backing::Memfd), region(0x10000, Backing::Anonymous)]).unwrap();
    Expected { vm: "web-1".into(), destination, layout }
}

fn good() -> Value {
    json!({"version": 1, "vm": "web-1", "role": "destination", "pid": 4711, "uffd": 0, "later": {"a": []}, "regions": [
        {"gpa": 0, "base_host_virt_addr": 0x7000_0000, "size": 0x4000, "page_size": 4096,
         "backing": "memfd", "fd": 1, "offset": 4096},
        {"gpa": 0x10000, "base_host_virt_addr": 0x6000_0000, "size": 0x4000, "page_size": 4096, "backing": "anonymous"},
    ]})
}

#[test]
fn a_good_message_is_understood_and_unknown_fields_ignored() {
    let handshake = validate(&good(), 2, &expected(true)).unwrap();
    assert_eq!(handshake.pid, Some(4711));
    assert_eq!(handshake.regions[0], HandshakeRegion { hva: Hva(0x7000_0000), file: Some((1, 4096)), uffd: Some(0) });
    assert_eq!(handshake.regions[1], HandshakeRegion { hva: Hva(0x6000_0000), file: None, uffd: Some(0) });
}

#[test]
fn a_region_may_have_a_userfaultfd_of_its_own() {
    let uffds = |message: &Value, descriptors| {
        validate(message, descriptors, &expected(true))
            .map(|handshake| handshake.regions.iter().map(|r| r.uffd).collect())
    };
    let mut message = good();
    message["regions"][1]["uffd"] = json!(2);
    assert_eq!(uffds(&message, 3), Ok(vec![Some(0), Some(2)]));
    let missing = uffds(&message, 2).unwrap_err().to_string();
    assert_eq!(missing, "regions[1].uffd: descriptor 2 is missing: 2 were sent");
    message.as_object_mut().unwrap().remove("uffd");
    assert_eq!(
        uffds(&message, 3).unwrap_err().to_string(),
        "uffd: is missing: a destination needs one, and regions[0] has none"
    );
    message["regions"][0]["uffd"] = json!(0);
    assert_eq!(uffds(&message, 3), Ok(vec![Some(0), Some(2)]));
    message["regions"][0]["uffd"] = json!("0");
    assert_eq!(uffds(&message, 3).unwrap_err().field, "regions[0].uffd");
    message["regions"][0]["uffd"] = json!(0);
    message["role"] = json!("source");
    assert_eq!(validate(&message, 3, &expected(false)).unwrap_err().field, "regions[0].uffd");
}

#[test]
fn every_wrong_field_is_named() {
    let change = |pointer: &str, value: Value| {
        let mut message = good();
        *message.pointer_mut(pointer).unwrap() = value;
        (
            pointer.trim_start_matches('/').replace("regions/0/", "regions[0].").replace("regions/1/", "regions[1]."),
            message,
        )
    };
    let cases = [
        change("/version", json!(2)),
        change("/version", json!("1")),
        change("/vm", json!("web-2")),
        change("/role", json!("source")),
        change("/pid", json!(0)),
        change("/pid", json!(-1)),
        change("/uffd", json!(2)),
        change("/uffd", json!(null)),
        change("/regions", json!({})),
        change("/regions", json!([])),
        change("/regions/0/gpa", json!(4096)),
        change("/regions/0/size", json!(4096)),
        change("/regions/0/size", json!(1.5)),
        change("/regions/1/page_size", json!(2 << 20)),
        change("/regions/0/backing", json!("anonymous")),
        change("/regions/0/fd", json!(7)),
        change("/regions/0/offset", json!(1)),
        change("/regions/1/base_host_virt_addr", json!(1)),
        change("/regions/1/base_host_virt_addr", json!(u64::MAX - 4095)),
        change("/regions/0/base_host_virt_addr", json!(0x6000_1000)),
    ];
    for (field, message) in cases {
        let refusal = validate(&message, 2, &expected(true)).unwrap_err();
        assert_eq!(refusal.field, field, "{refusal}");
    }
    assert_eq!(validate(&good(), 1, &expected(true)).unwrap_err().field, "regions[0].fd");
    assert_eq!(validate(&good(), 3, &expected(true)).unwrap_err().field, "descriptors");
    assert_eq!(validate(&good(), 65, &expected(true)).unwrap_err().field, "descriptors");
    assert_eq!(validate(&good(), 2, &expected(false)).unwrap_err().field, "role");
}

#[test]
fn a_destination_may_have_a_doorbell() {
    let mut message = good();
    assert_eq!(validate(&message, 2, &expected(true)).unwrap().doorbell, None);
    message["doorbell"] = json!(2);
    assert_eq!(validate(&message, 3, &expected(true)).unwrap().doorbell, Some(2));
    assert_eq!(validate(&message, 2, &expected(true)).unwrap_err().field, "doorbell");
    message["doorbell"] = json!("2");
    assert_eq!(validate(&message, 3, &expected(true)).unwrap_err().field, "doorbell");
    message["doorbell"] = json!(2);
    message["role"] = json!("source");
    message.as_object_mut().unwrap().remove("uffd");
    assert_eq!(validate(&message, 3, &expected(false)).unwrap_err().to_string(), "doorbell: a source has none");
}

#[test]
fn either_side_may_name_its_process() {
    let mut message = good();
    message["process"] = json!(2);
    assert_eq!(validate(&message, 3, &expected(true)).unwrap().process, Some(2));
    assert_eq!(validate(&message, 2, &expected(true)).unwrap_err().field, "process");
    message["doorbell"] = json!(3);
    assert_eq!(validate(&message, 4, &expected(true)).unwrap_err().field, "doorbell");
    message.as_object_mut().unwrap().remove("doorbell");
    message.as_object_mut().unwrap().remove("uffd");
    message["role"] = json!("source");
    message["process"] = json!(0);
    assert_eq!(validate(&message, 2, &expected(false)).unwrap().process, Some(0));
}

#[test]
fn firecracker_is_matched_by_ascending_offset() {
    let message = json!([
        {"base_host_virt_addr": 0x5000_0000, "size": 0x4000, "offset": 0x4000, "page_size": 4096, "page_size_kib": 4096},
        {"base_host_virt_addr": 0x7000_0000, "size": 0x4000, "offset": 0, "page_size": 4096, "page_size_kib": 4096},
    ]);
    let handshake = validate(&message, 1, &expected(true)).unwrap();
    assert!(handshake.silent && handshake.pid.is_none());
    assert!(handshake.regions.iter().all(|region| region.uffd == Some(0)));
    assert_eq!(handshake.regions[0].hva, Hva(0x7000_0000));
    assert_eq!(handshake.regions[1].hva, Hva(0x5000_0000));
    assert_eq!(validate(&message, 0, &expected(true)).unwrap_err().field, "uffd");
    assert_eq!(validate(&message, 2, &expected(true)).unwrap_err().field, "descriptors");
    assert_eq!(validate(&message, 1, &expected(false)).unwrap_err().field, "role");
    let gap = json!([message[0], {"base_host_virt_addr": 0, "size": 0x4000, "offset": 4096, "page_size": 4096}]);
    assert_eq!(validate(&gap, 1, &expected(true)).unwrap_err().field, "[1].offset");
}

#[test]
fn bytes_are_complete_incomplete_or_hopeless() {
    assert_eq!(complete(b"").unwrap(), None);
    assert_eq!(complete(b"{\"version\": 1, ").unwrap(), None);
    assert!(complete(b" [] \n").unwrap().is_some());
    assert!(complete(b"{} x").is_err());
    assert!(complete(b"nonsense").is_err());
    assert!(complete(b"7 ").is_err());
    assert!(complete(b"{\"a\": \xff}").is_err());
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        "[a-z-]{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::hash_map("[a-z_]{1,8}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    /// Whatever comes: an answer, never a panic.
    #[test]
    fn any_bytes_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(Some(value)) = complete(&bytes) {
            let _ = validate(&value, 1, &expected(true));
        }
    }

    /// A good message with any value at any place is understood or refused by a name.
    #[test]
    fn any_change_is_answered(place in 0usize..14, value in any_json(), descriptors in 0usize..70) {
        let pointers = [
            "", "/version", "/vm", "/role", "/pid", "/uffd", "/regions", "/regions/0", "/regions/1", "/regions/0/gpa",
            "/regions/0/size", "/regions/0/fd", "/regions/0/offset", "/regions/1/base_host_virt_addr",
        ];
        let mut message = good();
        *message.pointer_mut(pointers[place]).unwrap() = value;
        if let Err(refusal) = validate(&message, descriptors, &expected(true)) {
            prop_assert!(!refusal.field.is_empty());
        }
    }

    /// Every prefix of a good message is incomplete, never hopeless.
    #[test]
    fn a_message_may_come_in_pieces(cut in 0usize..100) {
        let bytes = serde_json::to_vec(&good()).unwrap();
        prop_assert_eq!(complete(&bytes[..cut]).unwrap(), None);
        prop_assert!(complete(&bytes).unwrap().is_some());
    }
}
