//! The control connection: malformed messages, lost connections, requests that fail.

use crate::stand_in::Vmm;
use serde_json::json;
use tempfile::tempdir;

const SMALL: [&str; 4] = ["--memory", "32M", "--workload", "random"];

fn with<'a>(more: &[&'a str]) -> Vec<&'a str> {
    SMALL.iter().chain(more).copied().collect()
}

#[test]
fn a_malformed_message_is_answered_and_the_vmm_connects_again() {
    let dir = tempdir().unwrap();
    let mut vmm = Vmm::start(dir.path(), "a", &SMALL);
    let frames: [(&[u8], &str); 4] = [
        (b"\0\0\0\x03{x}", ""),
        (b"\xff\xff\xff\xff", ""),
        (b"\0\0\0\x02{}", "type"),
        (b"\0\0\0\x0f{\"type\":\"stop\"}", "id"),
    ];
    for (bytes, field) in frames {
        vmm.send_raw(bytes);
        let answer = vmm.receive().unwrap();
        assert_eq!((&answer["code"], &answer["field"]), (&json!("BAD_MESSAGE"), &json!(field)), "{answer}");
        assert!(vmm.receive().is_none());
        vmm.accept_again();
        assert_eq!(vmm.hello["state"], "running");
    }
}

#[test]
fn memory_errors_are_sent_again_until_they_are_recorded() {
    let dir = tempdir().unwrap();
    let mut vmm = Vmm::start(dir.path(), "a", &SMALL);
    vmm.done(json!({"type": "stop"}));
    for page in 0..2 {
        let gpa = (20u64 << 20) + page * 4096;
        assert_eq!(vmm.admin(&json!({"cmd": "inject", "gpa": gpa, "tell": true}))["ok"], true);
    }
    vmm.told_until(2);
    vmm.send(&json!({"type": "recorded", "seq": 1}));
    vmm.send_raw(b"\0\0\0\x02{}");
    while vmm.receive().is_some() {}
    vmm.told.clear();
    vmm.accept_again();
    assert_eq!(vmm.hello["state"], "stopped");
    vmm.told_until(1);
    let again = &vmm.told[0];
    assert_eq!((&again["seq"], &again["severity"], &again["guest_visible"]), (&json!(2), &json!(null), &json!(false)));
}

#[test]
fn muted_it_tells_nothing() {
    let dir = tempdir().unwrap();
    let mut vmm = Vmm::start(dir.path(), "a", &with(&["--mute-errors"]));
    assert_eq!(vmm.admin(&json!({"cmd": "inject", "gpa": 20u64 << 20, "tell": true}))["ok"], true);
    vmm.report_until("a machine check", |report| report["machine_checks"] != json!([]));
    vmm.done(json!({"type": "stop"}));
    assert!(vmm.told.is_empty());
}

#[test]
fn it_misbehaves_as_asked() {
    let dir = tempdir().unwrap();
    let mut vmm = Vmm::start(dir.path(), "a", &with(&["--fail-at", "stop", "--die-at", "save_state"]));
    assert_eq!(vmm.ask(json!({"type": "stop"}))["code"], "FAILED");
    assert_eq!(vmm.ask(json!({"type": "stop"}))["type"], "reply");
    vmm.send(&json!({"type": "save_state", "id": 9}));
    assert!(vmm.receive().is_none());
    assert_eq!(vmm.child.wait().unwrap().code(), Some(3));
}

#[test]
fn requests_are_safe_to_repeat_and_a_refusal_names_both_states() {
    let dir = tempdir().unwrap();
    let mut vmm = Vmm::start(dir.path(), "a", &SMALL);
    let stopped = vmm.done(json!({"type": "stop"}));
    let again = vmm.done(json!({"type": "stop"}));
    assert_eq!(stopped["stopped_us"], again["stopped_us"]);
    let touches = vmm.report()["touches"].clone();
    let refused = vmm.ask(json!({"type": "load_state", "state": ""}));
    assert_eq!(refused["code"], "BAD_STATE");
    assert_eq!(refused["message"], "load_state needs a VM that is prepared; this one is stopped");
    assert_eq!(vmm.report()["touches"], touches, "a stopped guest touches nothing");
    vmm.done(json!({"type": "resume"}));
    vmm.done(json!({"type": "resume"}));
    vmm.report_until("running on", |report| report["touches"].as_u64() > touches.as_u64());
    assert_eq!(vmm.admin(&json!({"cmd": "quit"}))["ok"], true);
    assert_eq!(vmm.child.wait().unwrap().code(), Some(0));
}
