use std::io;
use std::time::Duration;

use super::*;
use crate::destination::error::DestinationError;
use crate::layout::page_run::PageRun;
use crate::source::memory::ReadError;
use crate::sys::pagemap::PagemapError;
use crate::sys::uffd_probe::ProbeError;

fn io() -> io::Error {
    io::ErrorKind::Other.into()
}

/// Each error, its code, and a word of its message.
#[test]
fn every_error_has_its_code_and_keeps_its_message() {
    let at = "127.0.0.1:1".parse().unwrap();
    let ip = "127.0.0.1".parse().unwrap();
    let asked = PageRun { region: 3, page: 7, count: 9 };
    let address = || "10.0.0.1:7".to_owned();
    let table: Vec<(Status, Code, &str)> = vec![
        (PagerError::Role { is: "A", needs: "B" }.into(), Code::FailedPrecondition, "role is A"),
        (PagerError::Unconfigured { first: "ServeSource" }.into(), Code::FailedPrecondition, "ServeSource"),
        (PagerError::ServesOther(at).into(), Code::AlreadyExists, "127.0.0.1:1"),
        (PagerError::ExpectsOther.into(), Code::AlreadyExists, "layout"),
        (PagerError::NoPort { ip, ports: 5..7, why: "x".into() }.into(), Code::ResourceExhausted, "[5, 7)"),
        (PagerError::Listen { at, source: io() }.into(), Code::InvalidArgument, "127.0.0.1:1"),
        (PagerError::LocalAddress(io()).into(), Code::Internal, "local address"),
        (PagerError::Thread(io()).into(), Code::ResourceExhausted, "thread"),
        (PagerError::Probe(ProbeError::Features(vec!["F"])).into(), Code::FailedPrecondition, "lacks F"),
        (
            PagerError::Destination(DestinationError::Thread(io())).into(),
            Code::FailedPrecondition,
            "thread: other error",
        ),
        (PagerError::Ended(Ended).into(), Code::Internal, "has ended"),
        (SourceError::NotAttached.into(), Code::FailedPrecondition, "attached"),
        (SourceError::NotFrozen.into(), Code::FailedPrecondition, "frozen"),
        (SourceError::Frozen.into(), Code::FailedPrecondition, "thawed"),
        (SourceError::Outside { asked, regions: 1 }.into(), Code::InvalidArgument, "region 3, pages 7 + 9"),
        (SourceError::Memory(ReadError::VmmGone { pid: 4711 }).into(), Code::Unavailable, "4711"),
        (Ended.into(), Code::Internal, "has ended"),
        (LinkError::NotAttached.into(), Code::FailedPrecondition, "attached"),
        (LinkError::Allocating.into(), Code::FailedPrecondition, "allocated"),
        (LinkError::NotConnected { reason: "why".into() }.into(), Code::FailedPrecondition, "why"),
        (ConnectLanesError::Ended(Ended).into(), Code::Internal, "has ended"),
        (ConnectLanesError::Link(LinkError::NotAttached).into(), Code::FailedPrecondition, "attached"),
        (connect(ConnectError::InvalidToken), Code::InvalidArgument, "token"),
        (
            connect(ConnectError::Unreachable { address: address(), cause: "refused".into() }),
            Code::Unavailable,
            "source 10.0.0.1:7: refused",
        ),
        (
            connect(ConnectError::TimedOut { address: address(), timeout: Duration::from_secs(3) }),
            Code::Unavailable,
            "no answer in 3s",
        ),
        (connect(ConnectError::LaneToken { address: address(), bytes: 5 }), Code::Unavailable, "5 bytes"),
        (
            connect(ConnectError::Lane { address: address(), source: io().into() }),
            Code::Unavailable,
            "lane to 10.0.0.1:7",
        ),
        (
            connect(ConnectError::Refused { code: Code::Unauthenticated, message: "no".into() }),
            Code::Unauthenticated,
            "no",
        ),
        (CompleteError::Absent { missing: 12 }.into(), Code::FailedPrecondition, "12 pages"),
        (CompleteError::Unregister(io()).into(), Code::Internal, "UFFDIO_UNREGISTER"),
        (PreallocateError::TooLate.into(), Code::FailedPrecondition, "before lanes"),
        (PreallocateError::NotAttached.into(), Code::FailedPrecondition, "attached"),
        (PreallocateError::Descriptor(io()).into(), Code::ResourceExhausted, "descriptor"),
        (
            PreallocateError::OutsideLayout { region: 1, page: 2, count: 3 }.into(),
            Code::InvalidArgument,
            "held: region 1, pages 2 + 3",
        ),
        (
            PreallocateError::NoMemory { gpa: 0x1000, size: 0x2000, source: io() }.into(),
            Code::ResourceExhausted,
            "0x2000 bytes of the guest from 0x1000",
        ),
        (PreallocateError::Touched { hva: 0x7000 }.into(), Code::FailedPrecondition, "0x7000"),
        (
            PreallocateError::Unguarded { hva: 0x7000, size: 0x1000, source: io() }.into(),
            Code::Internal,
            "0x1000 bytes at 0x7000",
        ),
        (PreallocateError::Pagemap(PagemapError::ProcessGone { pid: 7 }).into(), Code::Internal, "process 7"),
        (PreallocateError::Ended.into(), Code::Internal, "has ended"),
    ];
    for (status, code, word) in table {
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(word), "{status} lacks {word:?}");
    }
}

fn connect(error: ConnectError) -> Status {
    ConnectLanesError::Connect(error).into()
}
