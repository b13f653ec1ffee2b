//! A measurement without the pager ends with a reason if no thread answers its faults any more.

#![allow(clippy::unwrap_used)]

use std::fs::{read_dir, read_to_string};
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use vmferry_patience::patient;
use vmferry_refvm::userfaultfd::Userfaultfd;

/// What `look` finds, sooner or later.
fn until<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patient(60.0);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline);
        sleep(Duration::from_millis(10));
    }
}

/// Killed with the test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_floor_whose_source_has_ended_does_not_wait_for_ever() {
    if let Err(error) = Userfaultfd::new(0) {
        return println!("SKIPPED: userfaultfd: {error}");
    }
    let mut floor = Killed(
        Command::new(env!("CARGO_BIN_EXE_vmferry-bench-native"))
            .args(["floor", "--touches", "10000", "--pause-us", "50000"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let tasks = format!("/proc/{}/task", floor.0.id());
    let answers = |task: std::io::Result<std::fs::DirEntry>| {
        task.ok().and_then(|task| read_to_string(task.path().join("comm")).ok()).is_some_and(|name| name == "handler\n")
    };
    until(|| read_dir(&tasks).unwrap().any(answers).then_some(()));
    let source = read_to_string(format!("{tasks}/{}/children", floor.0.id())).unwrap();
    // SAFETY: the child of our child.
    assert_eq!(unsafe { libc::kill(source.trim().parse().unwrap(), libc::SIGKILL) }, 0);
    let status = until(|| floor.0.try_wait().unwrap());
    let mut words = String::new();
    floor.0.stderr.take().unwrap().read_to_string(&mut words).unwrap();
    assert_eq!(status.code(), Some(1), "{words}");
    assert!(words.contains("faults are answered no more"), "{words}");
}
