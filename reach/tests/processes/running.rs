//! Victims that run, get signals, lose threads, are stopped, or die.

use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use vmferry_patience::patient;
use vmferry_reach::proto::{ReachErrorCode, SeccompPolicy};

use crate::rig::{Named, Victim, linked, probe, probing, reach};

#[test]
fn a_spinning_thread_keeps_its_registers() {
    for program in linked() {
        let victim = Victim::start_program(program, &["spin", "1000"]);
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(600) {
            probe(&victim).assert_done();
        }
        victim.assert_undisturbed();
    }
}

#[test]
fn a_thread_in_a_restartable_sequence_leaves_it_by_its_abort_handler() {
    let victim = Victim::start(&["sequence", "1000"]);
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(600) {
        probe(&victim).assert_done();
    }
    victim.assert_undisturbed();
}

#[test]
fn no_signal_is_lost_and_no_interruption_seen_among_many() {
    let victim = Victim::start(&["signals", "3000"]);
    let named = Named::of_victim(&victim);
    let running = || {
        let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", victim.pid())).unwrap();
        let child =
            children.split_whitespace().next().map(|child| std::fs::read_to_string(format!("/proc/{child}/stat")));
        child.is_none_or(|stat| !stat.unwrap_or_default().contains(") Z "))
    };
    let mut probes = 0;
    while running() {
        reach(&named, probing(SeccompPolicy::Unspecified)).assert_done();
        probes += 1;
    }
    assert!(probes > 10, "only {probes} probes while signals came");
    victim.assert_undisturbed();
}

#[test]
fn threads_that_end_are_passed_over() {
    let victim = Victim::start(&["exits"]);
    let named = Named::of_victim(&victim);
    for _ in 0..60 {
        // The thread that stays is excluded, so that only those that end are left.
        let operation = vmferry_reach::proto::reach_request::Operation::Probe(vmferry_reach::proto::ProbeRequest {
            injection: crate::rig::rules(SeccompPolicy::Unspecified, &[victim.pid()]),
        });
        let answer = reach(&named, operation);
        if answer.error().is_some() {
            answer.assert_error(ReachErrorCode::NoThread);
        }
    }
    probe(&victim).assert_done();
    victim.assert_undisturbed();
}

#[test]
fn a_thread_that_never_leaves_the_kernel_is_passed_over() {
    let victim = Victim::start(&["worker"]);
    let operation = vmferry_reach::proto::reach_request::Operation::Probe(vmferry_reach::proto::ProbeRequest {
        injection: crate::rig::rules(SeccompPolicy::Unspecified, &[victim.pid()]),
    });
    reach(&Named::of_victim(&victim), operation).assert_error(ReachErrorCode::NoThread);
    probe(&victim).assert_done();
    victim.assert_undisturbed();
}

#[test]
fn a_stopped_process_stays_stopped() {
    let victim = Victim::start(&["asleep", "read", "0"]).until_asleep();
    let pid = Pid::from_raw(victim.pid()).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    probe(&victim).assert_done();
    let state = || std::fs::read_to_string(format!("/proc/{}/stat", victim.pid())).unwrap();
    // It stops again by itself once the program has detached.
    let began = Instant::now();
    while !state().contains(") T ") {
        assert!(began.elapsed() < patient(20.0), "{}", state());
        std::thread::sleep(Duration::from_millis(1));
    }
    kill_process(pid, Signal::CONT).unwrap();
    victim.assert_undisturbed();
}

#[test]
fn a_process_that_dies_during_the_call_is_reported_as_gone() {
    let mut died_in_time = 0;
    for round in 0..300u64 {
        let victim = Victim::start(&["asleep", "read", "0"]);
        let named = Named::of_victim(&victim);
        let killed = named_copy(&named);
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_micros(round * 7919 % 3000));
            killed.kill();
        });
        let answer = reach(&named, probing(SeccompPolicy::Unspecified));
        killer.join().unwrap();
        if answer.error().is_some() {
            answer.assert_error(ReachErrorCode::Gone);
            died_in_time += 1;
        }
    }
    assert!((1..300).contains(&died_in_time), "{died_in_time} of 300: no test of both ends");
}

fn named_copy(named: &Named) -> Named {
    Named { pid: named.pid, start_time: named.start_time, pidfd: named.pidfd.try_clone().unwrap() }
}
