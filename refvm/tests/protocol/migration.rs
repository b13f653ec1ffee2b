//! Two VMMs of threads, a daemon and a pager that stand in: a guest moves, its memory errors with it.

use std::os::unix::net::UnixListener;
use std::path::Path;

use crate::huge_pages::reserve;
use crate::stand_in::{Vmm, layout, send_frame, serve_pages, take_memory};
use serde_json::{Value, json};
use tempfile::tempdir;

const FIRST_PAGE: u64 = 16 << 20;

fn source(accel: &str, dir: &Path, backing: &str) -> Vmm {
    let arguments = ["--memory", "40M", "--regions", "2", "--vcpus", "2", "--workload", "random", "--backing", backing];
    Vmm::start_with(accel, dir, "source", &arguments)
}

fn checks_at(report: &Value, gpa: u64) -> usize {
    report["machine_checks"].as_array().unwrap().iter().filter(|check| check["gpa"] == gpa).count()
}

/// Moves the guest; its memory follows on first touch.
fn migrate(dir: &Path, source: &mut Vmm, destination: &mut Vmm) -> Value {
    let regions = layout(&source.hello);
    migrate_into(dir, source, destination, &regions)
}

/// The same, into regions that may be made of something else.
fn migrate_into(dir: &Path, source: &mut Vmm, destination: &mut Vmm, regions: &Value) -> Value {
    let memory = dir.join("memory.sock");
    let listener = UnixListener::bind(&memory).unwrap();
    source.done(json!({"type": "stop"}));
    let before = source.report();
    assert_eq!(before["state"], "stopped");
    serve_pages(listener, source.child.id(), source.hello["regions"].clone());
    let state = source.done(json!({"type": "save_state"}))["state"].clone();
    let prepare = json!({"type": "prepare", "regions": regions, "vcpus": 2, "socket": memory,
                         "uffd_features": ["UFFD_FEATURE_POISON", "UFFD_FEATURE_THREAD_ID"]});
    destination.done(prepare.clone());
    destination.done(prepare);
    destination.done(json!({"type": "load_state", "state": state}));
    assert!(destination.done(json!({"type": "start"}))["started_us"].as_u64().unwrap() > 0);
    before
}

fn moves_with_its_errors(accel: &str, backing: &str) {
    let dir = tempdir().unwrap();
    let mut source = source(accel, dir.path(), backing);
    assert_eq!((&source.hello["state"], &source.hello["vcpus"]), (&json!("running"), &json!(2)));
    source.report_until("at work", |report| report["writes"].as_u64() > Some(500));
    // One that the guest finds before it moves.
    let found = FIRST_PAGE + 5 * 4096;
    assert_eq!(source.admin(&json!({"cmd": "inject", "gpa": found, "tell": false}))["ok"], true);
    source.report_until("told by machine check", |report| checks_at(report, found) > 0);
    source.told_until(1);
    assert_eq!((&source.told[0]["gpa"], &source.told[0]["severity"]), (&json!(found), &json!("AR")));
    assert_eq!(source.told[0]["guest_visible"], true);

    let mut destination = Vmm::start_with(accel, dir.path(), "destination", &["--incoming"]);
    assert_eq!((&destination.hello["state"], &destination.hello["regions"]), (&json!("incoming"), &json!([])));
    migrate(dir.path(), &mut source, &mut destination);
    let after = destination
        .report_until("a touch of every page but the bad one", |r| r["first_touch_us"]["count"] == json!(6143));
    assert_eq!((&after["wrong_bytes"], &after["wrong_pages"]), (&json!(0), &json!([])), "{after}");
    assert_eq!(checks_at(&after, found), 1, "{after}");

    // One that happens here afterwards.
    let here = FIRST_PAGE + 9 * 4096;
    assert_eq!(destination.admin(&json!({"cmd": "inject", "gpa": here, "tell": true}))["ok"], true);
    let last = destination.report_until("told by machine check", |report| checks_at(report, here) > 0);
    assert_eq!(last["machine_checks"].as_array().unwrap().len(), 2, "{last}");
    assert_eq!(last["wrong_bytes"], 0);
    destination.told_until(2);
    destination.done(json!({"type": "migration_complete", "keep_uffd": true}));
    source.done(json!({"type": "abandon"}));
    assert_eq!(source.child.wait().unwrap().code(), Some(0));
    destination.report_until("at work after the end", |r| r["touches"].as_u64() > last["touches"].as_u64());
}

#[test]
fn a_guest_in_anonymous_memory_moves_with_its_errors() {
    moves_with_its_errors("process", "anonymous");
}

#[test]
fn a_guest_in_memfds_moves_with_its_errors() {
    moves_with_its_errors("process", "memfd");
}

#[test]
fn a_guest_of_kvm_moves_with_its_errors() {
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        eprintln!("skipped: /dev/kvm: {error}");
        return;
    }
    moves_with_its_errors("kvm", "anonymous");
    moves_with_its_errors("kvm", "memfd");
}

#[test]
fn an_error_that_nobody_told_is_found_by_reading_and_hits_once() {
    let dir = tempdir().unwrap();
    let mut source = source("process", dir.path(), "anonymous");
    source.done(json!({"type": "stop"}));
    let bad: Vec<u64> = (1..9).map(|n| FIRST_PAGE + n * 400 * 4096).collect();
    for gpa in &bad {
        assert_eq!(source.admin(&json!({"cmd": "inject", "gpa": gpa, "tell": false}))["ok"], true);
    }
    source.done(json!({"type": "resume"}));
    let mut destination = Vmm::start(dir.path(), "destination", &["--incoming"]);
    migrate(dir.path(), &mut source, &mut destination);
    let report =
        destination.report_until("all told", |report| report["machine_checks"].as_array().unwrap().len() >= bad.len());
    assert!(bad.iter().all(|gpa| checks_at(&report, *gpa) == 1), "{report}");
    let later = destination
        .report_until("once more around", |r| r["passes"].as_u64() > report["passes"].as_u64().map(|p| p + 2));
    assert_eq!((later["machine_checks"].as_array().unwrap().len(), &later["wrong_bytes"]), (8, &json!(0)), "{later}");
}

#[test]
fn a_guest_on_huge_pages_moves_to_small_ones_with_a_huge_page_that_is_bad() {
    let Some(_reserved) = reserve(20) else { return };
    let dir = tempdir().unwrap();
    let arguments = ["--memory", "40M", "--vcpus", "2", "--backing", "memfd", "--page-size", "2M"];
    let mut source = Vmm::start(dir.path(), "source", &arguments);
    assert_eq!(source.hello["regions"][0]["page_size"], 2 << 20);
    assert_eq!(source.hello["memory"], Value::Null);
    source.report_until("at work", |report| report["writes"].as_u64() > Some(500));
    let huge = FIRST_PAGE + (2 << 20);
    assert_eq!(source.admin(&json!({"cmd": "inject", "gpa": huge + 5 * 4096, "tell": true}))["ok"], true);
    source.report_until("told by machine check", |report| checks_at(report, huge) > 0);
    source.told_until(2);
    assert!(source.told.iter().all(|told| (&told["gpa"], &told["lsb"]) == (&json!(huge), &json!(21))));

    let own = ["--incoming", "--backing", "anonymous", "--page-size", "4K"];
    let mut destination = Vmm::start(dir.path(), "destination", &own);
    assert_eq!(destination.hello["memory"], json!({"backing": "anonymous", "page_size": 4096}));
    let refused = destination.ask(json!({"type": "prepare", "regions": layout(&source.hello), "vcpus": 2,
                                         "socket": "/none", "uffd_features": []}));
    assert_eq!((&refused["code"], &refused["field"]), (&json!("UNSUPPORTED"), &json!("regions[0].page_size")));
    let regions = json!([{"gpa": 0, "size": 40 << 20, "page_size": 4096, "backing": "anonymous"}]);
    let before = migrate_into(dir.path(), &mut source, &mut destination, &regions);
    let after = destination.report_until("through all its memory", |report| {
        report["passes"].as_u64() > before["passes"].as_u64().map(|passes| passes + 3)
    });
    // Told of the huge page at home, the guest touches no part of it here.
    assert_eq!((&after["wrong_bytes"], checks_at(&after, huge)), (&json!(0), 1), "{after}");
    assert_eq!(after["machine_checks"].as_array().unwrap().len(), 1, "{after}");
}

#[test]
fn a_destination_asks_for_collapse_only_with_transparent_huge_pages() {
    let Some(_reserved) = reserve(32) else { return };
    let dir = tempdir().unwrap();
    let features = json!(["UFFD_FEATURE_POISON", "UFFD_FEATURE_MINOR_SHMEM", "UFFD_FEATURE_MINOR_HUGETLBFS"]);
    for (name, page_size, more, collapse) in [
        ("huge", 2 << 20, None, Value::Null),
        ("small", 4096, None, Value::Null),
        ("thp", 4096, Some("--thp"), json!(true)),
    ] {
        let arguments: Vec<&str> = ["--incoming"].into_iter().chain(more).collect();
        let mut vmm = Vmm::start(dir.path(), name, &arguments);
        assert_eq!(vmm.hello["memory"], Value::Null);
        let socket = dir.path().join(name);
        let listener = UnixListener::bind(&socket).unwrap();
        let pager = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let (message, fds) = take_memory(&stream);
            send_frame(&stream, &json!({"type": "attached", "version": 1}));
            (stream, message, fds)
        });
        let regions = json!([{"gpa": 0, "size": 64 << 20, "page_size": page_size, "backing": "memfd"}]);
        vmm.done(
            json!({"type": "prepare", "regions": regions, "vcpus": 1, "uffd_features": features, "socket": socket}),
        );
        let (_stream, message, _fds) = pager.join().unwrap();
        assert_eq!(
            (&message["collapse"], &message["regions"][0]["page_size"]),
            (&collapse, &json!(page_size)),
            "{name}"
        );
    }
}

#[test]
fn a_vmm_without_enough_huge_pages_names_the_setting() {
    let dir = tempdir().unwrap();
    let mut vmm = Vmm::start(dir.path(), "destination", &["--incoming"]);
    let regions = json!([{"gpa": 0, "size": 1u64 << 42, "page_size": 2 << 20, "backing": "anonymous"}]);
    let answer =
        vmm.ask(json!({"type": "prepare", "regions": regions, "vcpus": 1, "uffd_features": [], "socket": "/s"}));
    assert_eq!((&answer["code"], &answer["field"]), (&json!("NO_MEMORY"), &json!("regions")), "{answer}");
    assert!(answer["message"].as_str().unwrap().contains("sysctl vm.nr_hugepages="), "{answer}");
    assert_eq!(vmm.admin(&json!({"cmd": "status"}))["state"], "incoming");
}

#[test]
fn a_reset_gives_everything_back_and_the_next_prepare_works() {
    let dir = tempdir().unwrap();
    let mut vmm = Vmm::start(dir.path(), "destination", &["--incoming"]);
    let regions = json!([{"gpa": 0, "size": 64 << 20, "page_size": 4096, "backing": "memfd"}]);
    for round in 0..3 {
        let socket = dir.path().join(format!("{round}.sock"));
        let listener = UnixListener::bind(&socket).unwrap();
        let pager = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let (message, fds) = take_memory(&stream);
            send_frame(&stream, &json!({"type": "attached", "version": 1}));
            (stream, message, fds)
        });
        vmm.done(json!({"type": "prepare", "regions": regions, "vcpus": 1, "uffd_features": [], "socket": socket}));
        let (stream, message, fds) = pager.join().unwrap();
        assert_eq!((fds.len(), &message["regions"][0]["fd"], &message["doorbell"]), (3, &json!(1), &json!(2)));
        vmm.done(json!({"type": "reset"}));
        assert_eq!(std::io::Read::read(&mut &stream, &mut [0; 1]).unwrap(), 0, "the memory connection has ended");
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", vmm.child.id())).unwrap();
        assert!(!maps.contains("guest-memory"), "{maps}");
        assert_eq!(vmm.admin(&json!({"cmd": "status"}))["state"], "incoming");
    }
}

#[test]
fn a_destination_that_cannot_says_why_and_waits_on() {
    let dir = tempdir().unwrap();
    let mut vmm = Vmm::start(dir.path(), "destination", &["--incoming"]);
    let prepare = |size: u64, page_size: u64, features: Value| {
        json!({"type": "prepare", "vcpus": 1, "uffd_features": features, "socket": dir.path().join("none"),
               "regions": [{"gpa": 0, "size": size, "page_size": page_size, "backing": "anonymous"}]})
    };
    for (request, code, field) in [
        (prepare(1 << 50, 4096, json!([])), "NO_MEMORY", "regions"),
        (prepare(64 << 20, 8192, json!([])), "UNSUPPORTED", "regions[0].page_size"),
        (prepare(64 << 20, 4096, json!(["UFFD_FEATURE_LOUD"])), "UNSUPPORTED", "uffd_features[0]"),
        (prepare(64 << 20, 4096, json!([7])), "BAD_MESSAGE", "uffd_features[0]"),
        (prepare(64 << 20, 4096, json!([])), "FAILED", "socket"),
        (json!({"type": "start"}), "BAD_STATE", "type"),
        (json!({"type": "dance"}), "BAD_MESSAGE", "type"),
    ] {
        let answer = vmm.ask(request);
        assert_eq!((&answer["code"], &answer["field"]), (&json!(code), &json!(field)), "{answer}");
        assert_eq!(vmm.admin(&json!({"cmd": "status"}))["state"], "incoming");
    }
}
