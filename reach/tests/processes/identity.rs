//! Whom the program refuses to reach into.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use vmferry_reach::proto::{ReachErrorCode, SeccompPolicy};

use crate::rig::{Named, Victim, as_nobody, is_root, probe, probing, reach, reach_by, rules};

fn probe_named(named: &Named) -> crate::rig::Answer {
    reach(named, probing(SeccompPolicy::Unspecified))
}

#[test]
fn another_start_time_is_another_process() {
    let victim = Victim::start(&["asleep", "read", "0"]).until_asleep();
    let named = Named::of_victim(&victim);
    let error = probe_named(&Named { start_time: named.start_time + 1, ..named })
        .assert_error(ReachErrorCode::Identity)
        .clone();
    assert!(error.message.contains("start_time"), "{}", error.message);
    victim.assert_undisturbed();
}

#[test]
fn the_pidfd_of_another_process_is_refused() {
    let (one, other) = (Victim::start(&["asleep", "read", "0"]), Victim::start(&["asleep", "read", "0"]));
    let named = Named { pidfd: Named::of_victim(&other).pidfd, ..Named::of_victim(&one) };
    probe_named(&named).assert_error(ReachErrorCode::Identity);
    let file = OwnedFd::from(tempfile::tempfile().unwrap());
    probe_named(&Named { pidfd: file, ..Named::of_victim(&one) }).assert_error(ReachErrorCode::Invalid);
}

#[test]
fn a_process_that_has_ended_is_gone() {
    let mut victim = Victim::start(&["asleep", "read", "0"]);
    let named = Named::of_victim(&victim);
    victim.child.kill().unwrap();
    // A zombie as well as one that was reaped.
    probe_named(&named).assert_error(ReachErrorCode::Gone);
    victim.child.wait().unwrap();
    probe_named(&named).assert_error(ReachErrorCode::Gone);
}

#[test]
fn a_kernel_thread_is_refused() {
    let is_kernel_thread =
        |pid: &i32| std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().contains("(kthreadd)");
    let Some(kthreadd) =
        Some(2).filter(|pid| std::path::Path::new(&format!("/proc/{pid}")).exists()).filter(is_kernel_thread)
    else {
        return println!("a_kernel_thread_is_refused: skipped, no kernel thread is seen here");
    };
    probe_named(&Named::of(kthreadd)).assert_error(ReachErrorCode::Identity);
}

#[test]
fn a_traced_process_is_refused() {
    let victim = Victim::start(&["asleep", "read", "0"]).until_asleep();
    let pid = victim.pid();
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let (ready, is_ready) = std::sync::mpsc::channel();
    let tracer = std::thread::spawn(move || {
        ready.send(vmferry_reach::sys::ptrace::seize(pid, 0).map(|()| rustix::thread::gettid())).unwrap();
        let _ = stopped.recv();
        // The kernel detaches from the thread's tracees when the thread ends.
    });
    let tracing = is_ready.recv().unwrap().unwrap().as_raw_nonzero();
    let error = probe(&victim).assert_error(ReachErrorCode::Traced).clone();
    assert!(error.message.contains(&format!("task {tracing}")), "{}", error.message);
    drop(stop);
    tracer.join().unwrap();
    probe(&victim).assert_done();
    victim.assert_undisturbed();
}

#[test]
fn excluded_threads_are_never_stopped() {
    let victim = Victim::start(&["asleep", "read", "0"]).until_asleep();
    let injection = rules(SeccompPolicy::Unspecified, &[victim.pid()]);
    let operation =
        vmferry_reach::proto::reach_request::Operation::Probe(vmferry_reach::proto::ProbeRequest { injection });
    let answer = reach(&Named::of_victim(&victim), operation);
    let error = answer.assert_error(ReachErrorCode::NoThread);
    assert!(error.message.contains("1 are excluded"), "{}", error.message);
    assert_eq!(answer.reply.calls, []);
    victim.assert_undisturbed();
}

#[test]
fn only_root_reaches_into_the_processes_of_others() {
    if !is_root("only_root_reaches_into_the_processes_of_others") {
        return;
    }
    let of_nobody = Victim::start_as_nobody(&["asleep", "read", "0"]).until_asleep();
    let of_root = Victim::start(&["asleep", "read", "0"]).until_asleep();
    probe(&of_nobody).assert_done();
    let as_nobody = |named: &Named| {
        let program = Path::new(env!("CARGO_BIN_EXE_reach-under-test"));
        reach_by(as_nobody(program), named, probing(SeccompPolicy::Unspecified))
    };
    as_nobody(&Named::of_victim(&of_root)).assert_error(ReachErrorCode::Permission);
    as_nobody(&Named::of_victim(&of_nobody)).assert_done();
    of_nobody.assert_undisturbed();
    of_root.assert_undisturbed();
}

#[test]
fn a_request_that_is_not_whole_names_the_field() {
    let victim = Victim::start(&["asleep", "read", "0"]);
    let named = Named::of_victim(&victim);
    assert!(named.pidfd.as_raw_fd() > 2);
    let answer = probe_named(&Named { pid: 0, ..named });
    assert!(answer.assert_error(ReachErrorCode::Invalid).message.contains("process.pid"));
}
