//! The memory socket against bad VMMs: each is told the field that is wrong, no descriptor leaks, and the next good
//! VMM is served all the same.

#![allow(clippy::unwrap_used, missing_docs, dead_code)]

mod rig;

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rig::{PAGE, PATIENCE, Vmm, eventually, layout};
use serde_json::{Value, json};
use vmferry_pager::internals::{Backing, Pager, Tuning, Userfaultfd, bind_private, fd_passing, memfd, serve_within};
use vmferry_pager::proto::{self, PagerRole};

/// Sends a message as a VMM and reads the answer until the pager closes.
fn refused(socket: &Path, message: &[u8], fds: &[BorrowedFd<'_>]) -> Value {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(*PATIENCE)).unwrap();
    fd_passing::send(&stream, message, fds).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let answer: Value = serde_json::from_slice(&answer[4..]).unwrap();
    assert_eq!(answer["type"], "error", "{answer}");
    answer
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[tokio::test]
async fn bad_vmms_are_told_why_and_harm_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("memory.sock");
    let pager = rig::pager(directory.path(), PagerRole::Destination, Tuning::default());
    let mut control = rig::control(directory.path().join("pager.sock")).await;
    assert_eq!(refused(&socket, b"{}", &[])["field"], "message");
    let expect = proto::ExpectDestinationRequest { layout: Some(layout(Backing::Memfd, 4)) };
    if let Err(status) = control.expect_destination(expect).await {
        eprintln!("skipped: {}", status.message());
        return;
    }
    let uffd = Userfaultfd::create().unwrap();
    let file = memfd("guest", 4 * PAGE).unwrap();
    let short = memfd("short", PAGE).unwrap();
    let good = json!({"version": 1, "vm": "web-1", "role": "destination", "pid": std::process::id(), "uffd": 0, "regions": [
        {"gpa": 0, "base_host_virt_addr": 0x10_0000, "size": 4 * PAGE, "page_size": PAGE, "backing": "memfd", "fd": 1, "offset": 0}]});
    let bytes = good.to_string().into_bytes();
    // SAFETY: takes numbers; a new descriptor that nobody else owns.
    let blocking = unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC)) };
    let (u, f, s, e) = (uffd.as_fd(), file.as_fd(), short.as_fd(), blocking.as_fd());
    let mut with_doorbell = good.clone();
    with_doorbell["doorbell"] = json!(2);
    let with_doorbell = with_doorbell.to_string().into_bytes();
    let before = open_descriptors();
    let cases: Vec<(&str, Vec<u8>, Vec<BorrowedFd<'_>>)> = vec![
        ("message", b"nonsense".to_vec(), vec![u]),
        ("message", bytes[..bytes.len() - 1].to_vec(), vec![u, f]),
        ("message", [bytes.clone(), b"x".to_vec()].concat(), vec![u, f]),
        ("message", vec![b' '; (64 << 10) + 1], vec![u, f]),
        ("version", json!({"version": 7}).to_string().into_bytes(), vec![u, f]),
        ("uffd", bytes.clone(), vec![]),
        ("uffd", bytes.clone(), vec![f, f]),
        ("regions[0].fd", bytes.clone(), vec![u]),
        ("regions[0].fd", bytes.clone(), vec![u, s]),
        ("regions[0].fd", bytes.clone(), vec![u, u]),
        ("doorbell", with_doorbell.clone(), vec![u, f]),
        ("doorbell", with_doorbell.clone(), vec![u, f, s]),
        ("doorbell", with_doorbell, vec![u, f, e]),
        ("descriptors", bytes.clone(), vec![u, f, f]),
        ("descriptors", bytes.clone(), vec![f; 65]),
        ("regions", b"[]".to_vec(), vec![u]),
    ];
    for (field, message, fds) in cases {
        let answer = refused(&socket, &message, &fds);
        assert_eq!(answer["field"], field, "{answer}");
    }
    eventually("every descriptor of a refused VMM is closed", async || open_descriptors() <= before).await;
    let status = control.get_status(proto::GetStatusRequest {}).await.unwrap().into_inner();
    assert!(!status.memory_attached && status.memory_reason.starts_with("regions"), "{status:?}");

    let vmm = Vmm::attach(&socket, Backing::Memfd, 4);
    assert_eq!(refused(&socket, &bytes, &[u, f])["field"], "message", "one VMM at a time");
    let status = control.get_status(proto::GetStatusRequest {}).await.unwrap().into_inner();
    assert!(status.memory_attached && status.vmm_pid == vmm.pid());
    drop(vmm);
    eventually("the end of the VMM is seen", async || {
        !control.clone().get_status(proto::GetStatusRequest {}).await.unwrap().into_inner().memory_attached
    })
    .await;
    control.shutdown(proto::ShutdownRequest { even_if_guest_dies: true }).await.unwrap();
    eventually("the pager ends", async || pager.is_finished()).await;
}

#[tokio::test]
async fn a_vmm_that_says_nothing_is_refused_in_time() {
    let within = Duration::from_millis(300);
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("memory.sock");
    let pager = Pager::new("web-1".into(), PagerRole::Source, directory.path().to_path_buf(), Tuning::default());
    let server = tokio::spawn(serve_within(bind_private(&socket).unwrap(), pager.clone(), within));
    let (answer, waited) = tokio::task::spawn_blocking(move || {
        let started = std::time::Instant::now();
        let mut silent = UnixStream::connect(socket).unwrap();
        silent.set_read_timeout(Some(*PATIENCE)).unwrap();
        let mut answer = Vec::new();
        silent.read_to_end(&mut answer).unwrap();
        (answer, started.elapsed())
    })
    .await
    .unwrap();
    assert!(waited >= within, "a VMM has its time: refused after {waited:?}");
    let answer: Value = serde_json::from_slice(&answer[4..]).unwrap();
    assert_eq!(answer["field"], "message");
    assert_eq!(answer["message"], "is not complete after 0.3 s");
    assert!(!server.is_finished(), "the next VMM is served all the same");
    server.abort();
}

/// A process that ends with the test, also where the test fails.
struct Sleeper(std::process::Child);

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn memory_of_a_named_process_lives_as_long_as_the_process() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("memory.sock");
    let pager = rig::pager(directory.path(), PagerRole::Source, Tuning::default());
    let mut control = rig::control(directory.path().join("pager.sock")).await;
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let serve = proto::ServeSourceRequest {
        layout: Some(layout(Backing::Memfd, 4)),
        listen_ip: "127.0.0.1".into(),
        port_first: port.into(),
        port_last: u32::from(port) + 1,
        token: "t".into(),
        push_bytes_per_s: 0,
    };
    control.serve_source(serve).await.unwrap();
    let mut child = Sleeper(std::process::Command::new("sleep").arg("600").spawn().unwrap());
    // SAFETY: takes numbers; a new descriptor that nobody else owns.
    let process = unsafe { OwnedFd::from_raw_fd(libc::syscall(libc::SYS_pidfd_open, child.0.id(), 0) as i32) };
    let file = memfd("guest", 4 * PAGE).unwrap();
    let message = json!({"version": 1, "vm": "web-1", "role": "source", "pid": child.0.id(), "process": 0, "regions": [
        {"gpa": 0, "base_host_virt_addr": 0x10_0000, "size": 4 * PAGE, "page_size": PAGE, "backing": "memfd", "fd": 1,
         "offset": 0}]});
    let mut stream = UnixStream::connect(&socket).unwrap();
    stream.set_read_timeout(Some(*PATIENCE)).unwrap();
    fd_passing::send(&stream, message.to_string().as_bytes(), &[process.as_fd(), file.as_fd()]).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let answer: Value = serde_json::from_slice(&answer[4..]).unwrap();
    assert_eq!(answer["type"], "attached", "{answer}");
    drop(stream);
    let status = control.get_status(proto::GetStatusRequest {}).await.unwrap().into_inner();
    assert!(status.memory_attached && status.vmm_pid == child.0.id(), "{status:?}");
    child.0.kill().unwrap();
    child.0.wait().unwrap();
    eventually("the end of the process is seen", async || {
        let status = control.clone().get_status(proto::GetStatusRequest {}).await.unwrap().into_inner();
        !status.memory_attached && status.memory_reason == "the VMM's process ended"
    })
    .await;
    control.shutdown(proto::ShutdownRequest { even_if_guest_dies: true }).await.unwrap();
    eventually("the pager ends", async || pager.is_finished()).await;
}
