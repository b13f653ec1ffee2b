//! The program gets signals while a thread of a victim runs a foreign call. The call takes as long as the test wants: it drops
//! memory of a userfaultfd, and waits until the test has read that event.

use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use vmferry_patience::patient;
use vmferry_reach::proto::reach_request::Operation;
use vmferry_reach::proto::{CreateUserfaultfdRequest, EmptyRequest, HvaRange};

use crate::memory::victim_with;
use crate::rig::{InBackground, Named, Victim, is_root, reach};
use crate::served::Served;

const SIZE: u64 = 16 * 4096;

/// A victim whose thread waits in an injected madvise(2).
fn in_foreign_call() -> (Victim, OwnedFd, InBackground) {
    let (victim, range) = victim_with("anonymous", SIZE, &[]);
    let named = Named::of_victim(&victim);
    let features = vec!["UFFD_FEATURE_EVENT_REMOVE".into()];
    let create = CreateUserfaultfdRequest { ranges: vec![range], features, ..Default::default() };
    let uffd = reach(&named, Operation::CreateUserfaultfd(create)).descriptors.pop().unwrap();
    Served(&uffd).copy(range.start, 1);
    let program = drop_pages(&named, range);
    let began = Instant::now();
    while !std::fs::read_to_string(format!("/proc/{}/syscall", victim.pid())).unwrap().starts_with("28 ") {
        assert!(began.elapsed() < patient(20.0), "the victim does not run madvise");
        std::thread::sleep(Duration::from_millis(1));
    }
    (victim, uffd, program)
}

fn drop_pages(named: &Named, range: HvaRange) -> InBackground {
    let empty = EmptyRequest { ranges: vec![range], discard: true, injection: None };
    InBackground::start(named, Operation::Empty(empty))
}

#[test]
fn a_signal_that_ends_the_program_waits_until_the_thread_is_restored() {
    if !is_root("a_signal_that_ends_the_program_waits_until_the_thread_is_restored") {
        return;
    }
    let (victim, uffd, mut program) = in_foreign_call();
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        program.send(signal);
    }
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(program.0.try_wait().unwrap(), None, "the thread still has foreign registers");
    Served(&uffd).removal();
    assert!(program.0.wait().unwrap().signal().is_some(), "the signals take effect afterwards");
    victim.assert_undisturbed();
}

#[test]
fn a_program_that_is_killed_takes_the_process_with_it() {
    if !is_root("a_program_that_is_killed_takes_the_process_with_it") {
        return;
    }
    let (mut victim, _uffd, program) = in_foreign_call();
    program.send(Signal::KILL);
    let began = Instant::now();
    let status = loop {
        match victim.child.try_wait().unwrap() {
            Some(status) => break status,
            None => assert!(began.elapsed() < patient(20.0), "the victim runs on with foreign registers"),
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    assert_eq!(status.signal(), Some(Signal::KILL.as_raw()));
}
