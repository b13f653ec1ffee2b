use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;

use tonic::Code;
use vmferry_patience::patient;

use super::*;
use crate::lane::connect::{ConnectError, SourceAddress};
use crate::lane::frame::{Ask, FrameHeader, FrameKind, HEADER_BYTES};
use crate::layout::{Backing, Gpa, Hva, Region};
use crate::proto::PageRange;
use crate::sys::memfd::memfd;
use crate::vmm::attached_memory::{AttachedFile, AttachedRegion};

const PAGES: u64 = 200;

fn layout_of(page_size: u64) -> MemoryLayout {
    let size = (PAGES * PAGE_SIZE).next_multiple_of(page_size);
    MemoryLayout::new(vec![Region { gpa: Gpa(0), size, page_size, backing: Backing::Memfd }]).unwrap()
}

/// A server over a memfd with page `n` filled with the byte `n`, so that page 0 is zeros.
fn server() -> SourceServer {
    let file = File::from(memfd("guest", PAGES * PAGE_SIZE).unwrap());
    (0..PAGES).for_each(|page| file.write_all_at(&[page as u8; PAGE_SIZE as usize], page * PAGE_SIZE).unwrap());
    let layout = layout_of(PAGE_SIZE);
    let server = SourceServer::new(layout.clone(), "right".into(), 0, Tuning::default());
    let file = Some(AttachedFile { fd: file.into(), offset: 0 });
    let regions = vec![AttachedRegion { hva: Hva(0), file, uffd: None }];
    let memory = AttachedMemory { vmm_pid: std::process::id(), layout, regions, uffds: Vec::new(), collapse: false };
    server.attach(memory).unwrap();
    server
}

fn memory_full_of(byte: u8) -> AttachedMemory {
    let file = File::from(memfd("guest", PAGES * PAGE_SIZE).unwrap());
    (0..PAGES).for_each(|page| file.write_all_at(&[byte; PAGE_SIZE as usize], page * PAGE_SIZE).unwrap());
    let file = Some(AttachedFile { fd: file.into(), offset: 0 });
    let regions = vec![AttachedRegion { hva: Hva(0), file, uffd: None }];
    let layout = layout_of(PAGE_SIZE);
    AttachedMemory { vmm_pid: std::process::id(), layout, regions, uffds: Vec::new(), collapse: false }
}

#[test]
fn frozen_source_takes_no_other_memory_until_it_is_thawed() {
    let server = server();
    server.freeze().unwrap();
    assert!(matches!(server.attach(memory_full_of(9)), Err(SourceError::Frozen)));
    let mut buffer = vec![0; PAGE_SIZE as usize];
    let mut runs = memory::Runs::default();
    let held = server.0.frozen_memory().unwrap();
    let at = held.read(0, 5, 1, &mut buffer, &mut runs).unwrap();
    if let memory::PageBytes::Mapped(page) = at {
        assert!(page.read(&mut buffer));
    }
    assert_eq!(buffer[0], 5, "the memory that was frozen is served");
    server.thaw();
    server.attach(memory_full_of(9)).unwrap();
}

/// The server on a port of its own, from another thread.
fn serve(server: &SourceServer) -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = server.clone();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let grpc = crate::server::pages_service::routes(server.clone());
            lanes::listener::accept(server, grpc, listener, std::future::pending()).await.unwrap();
        });
    });
    address
}

fn open(server: &SourceServer, token: &str, lacking: Option<(u64, u64)>) -> Result<TcpStream, ConnectError> {
    let source = SourceAddress {
        address: serve(server),
        token: token.into(),
        demand_timeout: patient(20.0),
        connect_timeout: patient(20.0),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let stream = runtime.block_on(async {
        let reached = source.reach("reno").await?;
        match lacking {
            None => reached.urgent().await,
            Some((page, count)) => reached.bulk(vec![PageRange { region: 0, page, count }]).await,
        }
    })?;
    assert_eq!(crate::lane::tests::congestion_control_of(&stream), "reno");
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(patient(20.0))).unwrap();
    Ok(stream)
}

/// The code with which the source refuses a lane.
fn refusal_code(opened: Result<TcpStream, ConnectError>) -> Code {
    match opened {
        Err(ConnectError::Refused { code, .. }) => code,
        other => panic!("{other:?}"),
    }
}

type Frame = (FrameHeader, Vec<u8>);

fn frame(stream: &mut TcpStream) -> Frame {
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header).unwrap();
    let header = FrameHeader::decode(&header).unwrap();
    let mut contents = vec![0; header.contents_bytes()];
    stream.read_exact(&mut contents).unwrap();
    (header, contents)
}

/// Asks on a lane of its own, and reads until all pages are there or the source gives up.
fn ask(server: &SourceServer, asks: &[(u64, u32)]) -> Vec<Frame> {
    let mut stream = open(server, "right", None).unwrap();
    for (page, count) in asks {
        stream.write_all(&Ask { region: 0, page: *page, count: *count }.encode()).unwrap();
    }
    let wanted: u64 = asks.iter().map(|(_, count)| u64::from(*count).max(1)).sum();
    let mut frames = Vec::new();
    let mut got = 0;
    while got < wanted {
        let next = frame(&mut stream);
        let failed = next.0.kind == FrameKind::Failed;
        got += u64::from(next.0.count);
        frames.push(next);
        if failed {
            break;
        }
    }
    frames
}

fn refusal(server: &SourceServer, ask_for: (u64, u32)) -> String {
    let (header, text) = ask(server, &[ask_for]).pop().unwrap();
    assert_eq!(header.kind, FrameKind::Failed);
    String::from_utf8(text).unwrap()
}

fn error(page: u64, guest_visible: bool) -> proto::MemoryError {
    let origin = ErrorOrigin::Vmm.into();
    proto::MemoryError { gpa: page * PAGE_SIZE, lsb: 12, origin, guest_visible, hop: 1, ..Default::default() }
}

fn told(frames: &[Frame]) -> Vec<(u64, u32, FrameKind)> {
    frames.iter().map(|(header, _)| (header.page, header.count, header.kind)).collect()
}

#[test]
fn a_demand_is_answered_with_zeros_data_and_poison() {
    let server = server();
    server.freeze().unwrap();
    server.mark_poisoned(&[error(3, true)]);
    let frames = ask(&server, &[(0, 5), (7, 1)]);
    let poison = FrameKind::Poison(PoisonInfo { origin: ErrorOrigin::Vmm, guest_visible: true, hop: 1 });
    let data = FrameKind::Data;
    assert_eq!(told(&frames), [(0, 1, FrameKind::Zero), (1, 2, data), (3, 1, poison), (4, 1, data), (7, 1, data)]);
    assert_eq!((frames[1].1[0], frames[1].1[PAGE_SIZE as usize]), (1, 2));
    assert_eq!(server.served(), (6, 4 * PAGE_SIZE));
}

#[test]
fn a_push_sends_every_lacking_page_once_and_ends() {
    let server = server();
    server.freeze().unwrap();
    server.mark_poisoned(&[error(50, false)]);
    let mut stream = open(&server, "right", Some((0, 160))).unwrap();
    let mut seen = BTreeMap::new();
    loop {
        let (header, contents) = frame(&mut stream);
        let mut bytes = contents.chunks_exact(PAGE_SIZE as usize);
        if header.kind == FrameKind::End {
            break;
        }
        for page in header.page..header.page + u64::from(header.count) {
            let contents = bytes.next().map(|page| {
                assert!(page.iter().all(|byte| *byte == page[0]));
                page[0]
            });
            assert_eq!(seen.insert(page, contents), None);
        }
    }
    let data = |page: u64| (page != 50 && page != 0).then_some(page as u8);
    assert_eq!(seen, (0..160).map(|page| (page, data(page))).collect());
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "the lane is closed");
}

#[test]
fn nothing_is_read_from_a_vm_that_may_run() {
    let server = server();
    assert!(refusal(&server, (1, 1)).contains("frozen"));
    assert_eq!(refusal_code(open(&server, "right", Some((1, 1)))), Code::FailedPrecondition);
    server.freeze().unwrap();
    assert_eq!(told(&ask(&server, &[(1, 1)])), [(1, 1, FrameKind::Data)]);
    server.thaw();
    assert!(refusal(&server, (1, 1)).contains("frozen"));
    let nothing = SourceServer::new(layout_of(PAGE_SIZE), String::new(), 0, Tuning::default());
    assert!(matches!(nothing.freeze(), Err(SourceError::NotAttached)));
}

#[test]
fn an_ask_that_comes_shortly_before_the_freeze_waits_for_it() {
    let server = server();
    let asked = std::thread::spawn({
        let server = server.clone();
        move || told(&ask(&server, &[(1, 1)]))
    });
    while server.latest_demand().is_none() {
        std::thread::yield_now();
    }
    server.freeze().unwrap();
    assert_eq!(asked.join().unwrap(), [(1, 1, FrameKind::Data)]);
}

#[test]
fn lanes_without_the_token_are_refused() {
    let server = server();
    server.freeze().unwrap();
    for token in ["", "wrong", "righ", "right1"] {
        assert_eq!(refusal_code(open(&server, token, Some((0, 1)))), Code::Unauthenticated, "{token}");
    }
}

#[test]
fn a_connection_without_an_agreed_lane_is_closed_without_a_byte() {
    let server = server();
    server.freeze().unwrap();
    let mut stream = TcpStream::connect(serve(&server)).unwrap();
    stream.write_all(&crate::lane::frame::hello(&[7; 32])).unwrap();
    stream.set_read_timeout(Some(patient(20.0))).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn asks_outside_the_layout_are_named() {
    let server = server();
    server.freeze().unwrap();
    for outside in [(PAGES - 1, 2), (u64::MAX, 2), (0, 0)] {
        let refused = refusal(&server, outside);
        assert!(refused.starts_with("range: ") && refused.contains(&outside.0.to_string()), "{refused}");
    }
    assert_eq!(refusal_code(open(&server, "right", Some((PAGES, 1)))), Code::InvalidArgument);
}

#[test]
fn an_error_after_the_good_copy_was_sent_is_counted_as_healed() {
    let server = server();
    server.freeze().unwrap();
    ask(&server, &[(1, 2)]);
    let outcome = server.mark_poisoned(&[error(1, false), error(9, false), error(9, false)]);
    assert_eq!(outcome, MarkOutcome { marked: 2, already: 1, healed: 1 });
    // A second request does not read it again: a good page may be bad now.
    assert!(matches!(told(&ask(&server, &[(1, 1)]))[..], [(1, 1, FrameKind::Poison(_))]));
}

#[test]
fn one_bad_piece_of_a_huge_page_is_told_alone() {
    let server = SourceServer::new(layout_of(2 << 20), "right".into(), 0, Tuning::default());
    assert_eq!(server.mark_poisoned(&[error(3, false)]).marked, 1);
    assert_eq!(server.mark_poisoned(&[proto::MemoryError { lsb: 21, ..error(3, false) }]).marked, 511);
}

#[test]
fn a_limited_push_waits_and_a_demand_does_not() {
    let server = server();
    server.freeze().unwrap();
    server.limit_push(1);
    let mut bulk = open(&server, "right", Some((1, 150))).unwrap();
    assert_eq!(told(&[frame(&mut bulk)])[0].0, 1, "the first chunk is free");
    // The second chunk would take three days.
    assert_eq!(told(&ask(&server, &[(190, 1)])), [(190, 1, FrameKind::Data)]);
    server.limit_push(0);
    let mut pages = 63;
    while pages < 150 {
        pages += u64::from(frame(&mut bulk).0.count);
    }
    assert_eq!(frame(&mut bulk).0.kind, FrameKind::End);
}

#[test]
fn short_gaps_are_left_out_where_there_are_too_many_runs() {
    let runs = vec![(0, 0, 1), (0, 2, 3), (0, 8, 9), (1, 0, 1)];
    assert_eq!(without_short_gaps(runs.clone(), 4), runs);
    assert_eq!(without_short_gaps(runs.clone(), 3), [(0, 0, 3), (0, 8, 9), (1, 0, 1)]);
    assert_eq!(without_short_gaps(runs, 1), [(0, 0, 9), (1, 0, 1)]);
}
