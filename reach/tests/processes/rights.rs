//! The program with few rights: those of the systemd unit, and none.

use std::process::Command;
use std::time::Instant;

use vmferry_patience::patient;
use vmferry_reach::proto::reach_request::Operation;
use vmferry_reach::proto::{CreateUserfaultfdRequest, EmptyRequest, ReachErrorCode, ReadMemoryRequest, SeccompPolicy};

use crate::memory::{victim_with, with_range};
use crate::rig::{
    InBackground, Named, Victim, filtered_with_the_rights_of_the_unit, is_root, probing, reach, reach_by, rules,
};

const PAGE: u64 = 4096;

fn with_capabilities(bounding: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set", bounding, "--no-new-privs"]).arg(env!("CARGO_BIN_EXE_reach-under-test"));
    command
}

#[test]
fn the_rights_of_the_unit_suffice_for_a_process_of_another_user_with_a_filter() {
    const TEST: &str = "the_rights_of_the_unit_suffice_for_a_process_of_another_user_with_a_filter";
    let Ok(device) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/userfaultfd") else {
        return println!("{TEST}: skipped, /dev/userfaultfd cannot be opened");
    };
    if !is_root(TEST) {
        return;
    }
    let fork = libc::SYS_fork.to_string();
    for kind in ["anonymous", "memfd"] {
        let arguments = ["filtered", "kill", &fork, "memory", kind, "65536", "4096"];
        let (victim, range) = with_range(Victim::start_as_nobody_with(&device, &arguments));
        let named = Named::of_victim(&victim);
        let injection = || rules(SeccompPolicy::Trust, &[]);
        let empty = EmptyRequest { ranges: vec![range], discard: true, injection: injection() };
        reach_by(filtered_with_the_rights_of_the_unit(), &named, Operation::Empty(empty)).assert_done();
        let create = CreateUserfaultfdRequest {
            ranges: vec![range],
            features: vec!["UFFD_FEATURE_POISON".into()],
            device: Some(victim.descriptor("/dev/userfaultfd")),
            close_in_process: true,
            injection: injection(),
        };
        reach_by(filtered_with_the_rights_of_the_unit(), &named, Operation::CreateUserfaultfd(create)).assert_done();
        let answer = reach_by(filtered_with_the_rights_of_the_unit(), &named, probing(SeccompPolicy::Unspecified));
        assert!(answer.assert_error(ReachErrorCode::Seccomp).message.contains("CAP_SYS_ADMIN"));
        let answer = reach_by(filtered_with_the_rights_of_the_unit(), &named, probing(SeccompPolicy::Suspend));
        assert!(answer.assert_error(ReachErrorCode::Permission).message.contains("CAP_SYS_ADMIN"));
        victim.assert_undisturbed();
    }
}

#[test]
fn without_the_right_to_trace_the_answer_names_it() {
    if !is_root("without_the_right_to_trace_the_answer_names_it") {
        return;
    }
    let victim = Victim::start_as_nobody(&["asleep", "read", "0"]).until_asleep();
    let answer = reach_by(with_capabilities("-all"), &Named::of_victim(&victim), probing(SeccompPolicy::Trust));
    assert!(answer.assert_error(ReachErrorCode::Permission).message.contains("CAP_SYS_PTRACE"));
    victim.assert_undisturbed();
}

/// A read of memory that waits for a page stays long enough to be looked at.
#[test]
fn capabilities_that_the_request_does_not_need_are_gone() {
    if !is_root("capabilities_that_the_request_does_not_need_are_gone") {
        return;
    }
    let (victim, range) = victim_with("memfd", 4 * PAGE, &[]);
    let named = Named::of_victim(&victim);
    let create = CreateUserfaultfdRequest { ranges: vec![range], ..Default::default() };
    let uffd = reach(&named, Operation::CreateUserfaultfd(create)).descriptors;
    let read = Operation::ReadMemory(ReadMemoryRequest { ranges: vec![range] });
    let reader = InBackground::start(&named, read);
    let began = Instant::now();
    let status = loop {
        let status = std::fs::read_to_string(format!("/proc/{}/status", reader.0.id())).unwrap();
        if !status.contains("State:\tR") && status.contains("NoNewPrivs:\t1") {
            break status;
        }
        assert!(began.elapsed() < patient(20.0), "{status}");
    };
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    // CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH.
    let kept = format!("{:016x}", 1u64 << 19 | 1 << 2);
    for set in ["CapEff:", "CapPrm:"] {
        assert_eq!(field(set), kept, "{set}");
    }
    for set in ["CapInh:", "CapAmb:"] {
        assert_eq!(field(set), "0".repeat(16), "{set}");
    }
    drop(reader);
    drop(uffd);
}
