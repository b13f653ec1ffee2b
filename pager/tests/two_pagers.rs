//! Both sides of the program: a source pager reads a VMM's memory, a destination pager installs it in another.

#![allow(clippy::unwrap_used, missing_docs, dead_code)]

mod rig;

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use rig::{Answer, PAGE, Rig, byte_of, layout};
use serde_json::json;
use vmferry_pager::internals::{Backing, Tuning, fd_passing, memfd};
use vmferry_pager::proto::{self, LinkState, MemoryError, PagerRole, pager_event::Event};

const PAGES: u64 = 600;

#[tokio::test]
async fn memory_moves_from_pager_to_pager() {
    let Some(mut rig) = Rig::start(Backing::Memfd, PAGES, |_| Answer::Silence).await else { return };
    let directory = tempfile::tempdir().unwrap();
    let pager = rig::pager(directory.path(), PagerRole::Source, Tuning::default());
    let mut control = rig::control(directory.path().join("pager.sock")).await;
    let request = proto::ServeSourceRequest {
        layout: Some(layout(Backing::Memfd, PAGES)),
        listen_ip: "127.0.0.1".into(),
        port_first: 17_700,
        port_last: 17_900,
        token: "one-time-token".into(),
        push_bytes_per_s: 0,
    };
    let lane_address = control.serve_source(request.clone()).await.unwrap().into_inner().lane_address;
    assert_eq!(control.serve_source(request.clone()).await.unwrap().into_inner().lane_address, lane_address);
    let other = proto::ServeSourceRequest { token: "another".into(), ..request };
    assert_eq!(control.serve_source(other).await.unwrap_err().code(), tonic::Code::AlreadyExists);
    let freeze = control.freeze(proto::FreezeRequest {}).await.unwrap_err();
    assert_eq!(freeze.code(), tonic::Code::FailedPrecondition);

    let guest = memfd("source", PAGES * PAGE).unwrap();
    let file = std::fs::File::from(guest.try_clone().unwrap());
    for page in (0..PAGES).filter(|p| p % 3 != 0) {
        file.write_all_at(&[byte_of(page); PAGE as usize], page * PAGE).unwrap();
    }
    let region = json!({"gpa": 0, "base_host_virt_addr": 0x10_0000, "size": PAGES * PAGE, "page_size": PAGE,
        "backing": "memfd", "fd": 0, "offset": 0});
    let message =
        json!({"version": 1, "vm": "web-1", "role": "source", "pid": std::process::id(), "regions": [region]});
    let mut vmm = UnixStream::connect(directory.path().join("memory.sock")).unwrap();
    fd_passing::send(&vmm, message.to_string().as_bytes(), &[guest.as_fd()]).unwrap();
    let mut answer = [0; 4];
    vmm.read_exact(&mut answer).unwrap();
    let bad = MemoryError { gpa: 100 * PAGE, lsb: 12, guest_visible: true, ..MemoryError::default() };
    control.mark_poisoned(proto::MarkPoisonedRequest { errors: vec![bad] }).await.unwrap();
    // A page of a VM that may run is refused: the fault waits until it is frozen.
    rig.connect_to(lane_address.clone()).await.unwrap();
    let early = rig.vmm.touch(200);
    let Event::Link(down) = rig.event(|e| matches!(e, Event::Link(l) if l.state() == LinkState::Down)).await else {
        unreachable!()
    };
    assert!(down.reason.contains("frozen"), "{}", down.reason);
    control.freeze(proto::FreezeRequest {}).await.unwrap();

    rig.connect_to(lane_address).await.unwrap();
    assert_eq!(early.await.unwrap(), byte_of(200));
    rig.push().await.unwrap();
    rig.event(|e| matches!(e, Event::AllPresent(_))).await;
    for page in (0..PAGES).filter(|p| *p != 100) {
        let expected = if page % 3 == 0 { 0 } else { byte_of(page) };
        assert_eq!(rig.vmm.touch(page).await.unwrap(), expected, "page {page}");
    }
    assert!(rig.vmm.is_marked(100).await);
    let progress = rig.progress().await;
    assert_eq!((progress.poison, progress.zero, progress.demand), (1, PAGES / 3, 1), "{progress:?}");
    let status = control.get_status(proto::GetStatusRequest {}).await.unwrap().into_inner();
    assert!(status.frozen && status.pages_served > 0);
    control.shutdown(proto::ShutdownRequest::default()).await.unwrap();
    rig::eventually("the source's pager ends", async || pager.is_finished()).await;
    rig.end().await;
}
