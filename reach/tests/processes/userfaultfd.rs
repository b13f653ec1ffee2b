//! A userfaultfd of another process, by the descriptor that is handed over: its faults are served by hand here.

use std::os::fd::OwnedFd;
use std::process::Command;

use vmferry_reach::proto::reach_reply::Outcome;
use vmferry_reach::proto::reach_request::Operation;
use vmferry_reach::proto::{
    CloseUserfaultfdRequest, CreateUserfaultfdReply, CreateUserfaultfdRequest, HvaRange, ReachErrorCode, ReachRequest,
    ReadMemoryRequest, SeccompPolicy,
};

use crate::memory::{victim_with, with_range};
use crate::rig::{Answer, Named, Victim, is_root, reach, rules, run};
use crate::served::Served;

const PAGE: u64 = 4096;
const SIZE: u64 = 64 * PAGE;
const FEATURES: [&str; 3] = ["UFFD_FEATURE_MISSING_SHMEM", "UFFD_FEATURE_THREAD_ID", "UFFD_FEATURE_POISON"];

fn request(range: HvaRange, device: Option<u32>) -> CreateUserfaultfdRequest {
    CreateUserfaultfdRequest {
        ranges: vec![range],
        features: FEATURES.map(String::from).to_vec(),
        device,
        close_in_process: false,
        injection: rules(SeccompPolicy::Unspecified, &[]),
    }
}

fn create(victim: &Victim, request: CreateUserfaultfdRequest) -> Answer {
    reach(&Named::of_victim(victim), Operation::CreateUserfaultfd(request))
}

fn made(answer: Answer) -> (CreateUserfaultfdReply, OwnedFd) {
    answer.assert_done();
    match answer.reply.outcome {
        Some(Outcome::CreateUserfaultfd(reply)) => (reply, answer.descriptors.into_iter().next().unwrap()),
        other => panic!("{other:?}"),
    }
}

fn descriptors_of(victim: &Victim) -> Vec<String> {
    let entries = std::fs::read_dir(format!("/proc/{}/fd", victim.pid())).unwrap();
    entries.map(|entry| std::fs::read_link(entry.unwrap().path()).unwrap().display().to_string()).collect()
}

fn has_userfaultfd(victim: &Victim) -> bool {
    descriptors_of(victim).iter().any(|link| link.contains("userfaultfd]"))
}

#[test]
fn a_touch_waits_for_its_page() {
    if !is_root("a_touch_waits_for_its_page") {
        return;
    }
    for kind in ["anonymous", "memfd", "private memfd"] {
        let (mut victim, range) = victim_with(kind, SIZE, &[]);
        let (reply, uffd) = made(create(&victim, request(range, None)));
        assert!(reply.descriptor_in_process.is_some() && reply.ioctls[0] & 1 << 3 != 0, "{kind}: {reply:?}");
        victim.say(&format!("read {}", 3 * PAGE));
        let served = Served(&uffd);
        assert_eq!(served.fault(), range.start + 3 * PAGE, "{kind}");
        served.copy(range.start + 3 * PAGE, b'q');
        assert_eq!(victim.line(), format!("byte {}", b'q'), "{kind}");
    }
}

#[test]
fn a_process_without_rights_gets_one_by_the_device_that_it_is_given() {
    const TEST: &str = "a_process_without_rights_gets_one_by_the_device_that_it_is_given";
    if !is_root(TEST) || std::fs::File::open("/dev/userfaultfd").is_err() {
        return println!("{TEST}: skipped, /dev/userfaultfd cannot be opened");
    }
    if std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap().trim() != "0" {
        return println!("{TEST}: skipped, vm.unprivileged_userfaultfd is set");
    }
    let device = std::fs::OpenOptions::new().read(true).write(true).open("/dev/userfaultfd").unwrap();
    let (mut victim, range) = with_range(Victim::start_as_nobody_with(&device, &["memory", "anonymous", "65536"]));
    let number = victim.descriptor("/dev/userfaultfd");
    let plain = create(&victim, request(range, None));
    let error = plain.assert_error(ReachErrorCode::Call);
    assert_eq!(error.errno, Some(libc::EPERM.cast_unsigned()));
    assert!(error.message.contains("device"), "{}", error.message);
    let (_, uffd) = made(create(&victim, request(range, Some(number))));
    victim.say("read 0");
    let served = Served(&uffd);
    assert_eq!(served.fault(), range.start);
    served.copy(range.start, 7);
    assert_eq!(victim.line(), "byte 7");
}

#[test]
fn another_descriptor_than_the_device_is_not_touched() {
    let (victim, range) = victim_with("memfd", SIZE, &[]);
    for descriptor in [0, 3, 4000] {
        let answer = create(&victim, request(range, Some(descriptor)));
        answer.assert_error(ReachErrorCode::Failed);
        assert_eq!(answer.reply.calls, [], "descriptor {descriptor}");
        let close = CloseUserfaultfdRequest { descriptor, injection: None };
        let answer = reach(&Named::of_victim(&victim), Operation::CloseUserfaultfd(close));
        answer.assert_error(ReachErrorCode::Failed);
        assert_eq!(answer.reply.calls, [], "descriptor {descriptor}");
    }
    victim.assert_undisturbed();
}

#[test]
fn memory_that_is_not_empty_gets_none() {
    for touched in ["8192", "allocate:8192"] {
        let (victim, range) = victim_with("memfd", SIZE, &[touched]);
        let answer = create(&victim, request(range, None));
        assert_eq!(answer.assert_error(ReachErrorCode::NotEmpty).address, Some(range.start + 8192));
        assert!(!has_userfaultfd(&victim));
        victim.assert_undisturbed();
    }
}

#[test]
fn a_failure_leaves_none_behind() {
    if !is_root("a_failure_leaves_none_behind") {
        return;
    }
    let (victim, range) = victim_with("memfd", SIZE, &[]);
    let (_, uffd) = made(create(&victim, request(range, None)));
    // A second cannot register what the first has.
    let answer = create(&victim, request(range, None));
    assert_eq!(answer.assert_error(ReachErrorCode::Failed).errno, Some(libc::EBUSY.cast_unsigned()));
    let names: Vec<_> = answer.reply.calls.iter().map(|call| call.name.as_str()).collect();
    assert_eq!(names, ["userfaultfd", "close"]);
    assert_eq!(descriptors_of(&victim).iter().filter(|link| link.contains("userfaultfd]")).count(), 1);
    let unknown = CreateUserfaultfdRequest { features: vec!["UFFD_FEATURE_TEA".into()], ..request(range, None) };
    create(&victim, unknown).assert_error(ReachErrorCode::Invalid);
    drop(uffd);
    victim.assert_undisturbed();
}

#[test]
fn it_is_closed_in_the_process_at_once_or_later() {
    if !is_root("it_is_closed_in_the_process_at_once_or_later") {
        return;
    }
    let (mut victim, range) = victim_with("memfd", SIZE, &[]);
    let (reply, uffd) =
        made(create(&victim, CreateUserfaultfdRequest { close_in_process: true, ..request(range, None) }));
    assert_eq!(reply.descriptor_in_process, None);
    assert!(!has_userfaultfd(&victim));
    victim.say("read 0");
    let served = Served(&uffd);
    served.copy(served.fault(), 5);
    assert_eq!(victim.line(), "byte 5", "the copy keeps it");
    drop(uffd);

    let (victim, range) = victim_with("memfd", SIZE, &[]);
    let (reply, uffd) = made(create(&victim, request(range, None)));
    drop(uffd);
    let close = CloseUserfaultfdRequest { descriptor: reply.descriptor_in_process.unwrap(), injection: None };
    reach(&Named::of_victim(&victim), Operation::CloseUserfaultfd(close)).assert_done();
    assert!(!has_userfaultfd(&victim));
    victim.assert_undisturbed();
}

#[test]
fn a_poisoned_page_is_named_by_a_read() {
    if !is_root("a_poisoned_page_is_named_by_a_read") {
        return;
    }
    let (victim, range) = victim_with("memfd", SIZE, &[]);
    let (_, uffd) = made(create(&victim, request(range, None)));
    let served = Served(&uffd);
    for page in 0..8 {
        if page != 5 {
            served.copy(range.start + page * PAGE, 1);
        }
    }
    served.poison(range.start + 5 * PAGE);
    let read = |from, pages| {
        let ranges = vec![HvaRange { start: range.start + from * PAGE, size: pages * PAGE }];
        reach(&Named::of_victim(&victim), Operation::ReadMemory(ReadMemoryRequest { ranges }))
    };
    assert_eq!(read(0, 8).assert_error(ReachErrorCode::Poisoned).address, Some(range.start + 5 * PAGE));
    assert_eq!(read(5, 1).assert_error(ReachErrorCode::Poisoned).address, Some(range.start + 5 * PAGE));
    read(0, 5).assert_done();
    read(6, 2).assert_done();
    victim.assert_undisturbed();
}

#[test]
fn a_reply_with_descriptors_needs_a_socket() {
    let (victim, range) = victim_with("memfd", SIZE, &[]);
    let named = Named::of_victim(&victim);
    let operation = Some(Operation::CreateUserfaultfd(request(range, None)));
    let request = ReachRequest { process: Some(named.inheritable()), descriptor_socket: 0, operation };
    let answer = run(Command::new(env!("CARGO_BIN_EXE_reach-under-test")), &request);
    assert!(answer.assert_error(ReachErrorCode::Invalid).message.contains("descriptor_socket"));
    assert_eq!(answer.reply.calls, []);
}
