use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

use tonic::Code;
use tonic::transport::Channel;

use super::*;
use crate::attached::{AttachedFile, AttachedRegion};
use crate::proto::pages_client::PagesClient;
use crate::region_map::{Backing, Gpa, Hva, Region};

const PAGE: u64 = 4096;
const PAGES: u64 = 200;

fn layout() -> Layout {
    Layout::new(vec![Region { gpa: Gpa(0), size: PAGES * PAGE, page_size: PAGE, backing: Backing::Memfd }]).unwrap()
}

/// A server over a memfd in which page `n` is filled with the byte `n`, so that page 0 is zeros.
fn server() -> SourceServer {
    // SAFETY: a literal name; the descriptor is ours.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC)) };
    (0..PAGES).for_each(|page| file.write_all_at(&[page as u8; PAGE as usize], page * PAGE).unwrap());
    let server = SourceServer::new(layout(), "right".into());
    let file = Some(AttachedFile { fd: file.into(), offset: 0 });
    let regions = vec![AttachedRegion { hva: Hva(0), file }];
    server.attach(AttachedMemory { vmm_pid: std::process::id(), layout: layout(), regions, uffd: None }).unwrap();
    server
}

async fn client(server: &SourceServer) -> PagesClient<Channel> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(server.clone().serve(listener, std::future::pending()));
    let client = PagesClient::connect(format!("http://{address}")).await.unwrap();
    client.max_decoding_message_size(usize::MAX)
}

fn with_token<T>(message: T, token: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert(lanes::TOKEN_KEY, token.parse().unwrap());
    request
}

use tonic::Request;

fn demand(page: u64, count: u64) -> proto::PageRequest {
    let range = Some(proto::PageRange { region: 0, page, count });
    proto::PageRequest { protocol_version: PROTOCOL_VERSION, range }
}

fn push(page: u64, count: u64) -> proto::PushRequest {
    let lacking = vec![proto::PageRange { region: 0, page, count }];
    proto::PushRequest { protocol_version: PROTOCOL_VERSION, lacking }
}

fn error(page: u64, guest_visible: bool) -> proto::MemoryError {
    let origin = proto::ErrorOrigin::Vmm.into();
    proto::MemoryError { gpa: page * PAGE, lsb: 12, origin, guest_visible, hop: 1, ..Default::default() }
}

/// Asks for pages by demand and gives the replies until the stream ends.
async fn ask(server: &SourceServer, requests: Vec<proto::PageRequest>) -> Result<Vec<proto::Run>, Status> {
    let mut replies =
        client(server).await.demand(with_token(tokio_stream::iter(requests), "right")).await?.into_inner();
    let mut runs = Vec::new();
    while let Some(reply) = replies.message().await? {
        runs.extend(reply.runs);
    }
    Ok(runs)
}

fn kinds(runs: &[proto::Run]) -> Vec<(u64, u64, &'static str)> {
    let kind = |run: &proto::Run| match run.contents.as_ref().unwrap() {
        proto::run::Contents::Data(_) => "data",
        proto::run::Contents::Zero(_) => "zero",
        proto::run::Contents::Poison(_) => "poison",
    };
    runs.iter().map(|run| (run.page, run.count, kind(run))).collect()
}

#[tokio::test]
async fn a_demand_is_answered_with_zeros_data_and_poison() {
    let server = server();
    server.freeze().unwrap();
    server.mark_poisoned(&[error(3, true)]);
    let runs = ask(&server, vec![demand(0, 5), demand(7, 1)]).await.unwrap();
    assert_eq!(kinds(&runs), [(0, 1, "zero"), (1, 2, "data"), (3, 1, "poison"), (4, 1, "data"), (7, 1, "data")]);
    let proto::run::Contents::Data(bytes) = runs[1].contents.clone().unwrap() else { unreachable!() };
    assert_eq!((bytes[0], bytes[PAGE as usize]), (1, 2));
    let expected = proto::Poison { origin: proto::ErrorOrigin::Vmm.into(), guest_visible: true, hop: 1 };
    assert_eq!(runs[2].contents, Some(proto::run::Contents::Poison(expected)));
    assert_eq!(server.served(), (6, 4 * PAGE));
}

#[tokio::test]
async fn a_push_sends_every_lacking_page_once() {
    let server = server();
    server.freeze().unwrap();
    server.mark_poisoned(&[error(50, false)]);
    let mut stream = client(&server).await.push(with_token(push(10, 150), "right")).await.unwrap().into_inner();
    let mut seen = BTreeMap::new();
    while let Some(reply) = stream.message().await.unwrap() {
        for run in reply.runs {
            for at in 0..run.count {
                let byte = match run.contents.as_ref().unwrap() {
                    proto::run::Contents::Data(bytes) => Some(bytes[(at * PAGE) as usize]),
                    _ => None,
                };
                assert_eq!(seen.insert(run.page + at, byte), None);
            }
        }
    }
    let expected = (10..160u64).map(|page| (page, (page != 50).then_some(page as u8))).collect();
    assert_eq!(seen, expected);
}

#[tokio::test]
async fn nothing_is_read_from_a_vm_that_may_run() {
    let server = server();
    assert_eq!(ask(&server, vec![demand(1, 1)]).await.unwrap_err().code(), Code::FailedPrecondition);
    server.freeze().unwrap();
    assert!(ask(&server, vec![demand(1, 1)]).await.is_ok());
    server.thaw();
    assert_eq!(ask(&server, vec![demand(1, 1)]).await.unwrap_err().code(), Code::FailedPrecondition);
    assert!(SourceServer::new(layout(), String::new()).freeze().is_err());
}

#[tokio::test]
async fn lanes_without_the_token_are_refused() {
    let server = server();
    server.freeze().unwrap();
    for token in ["", "wrong", "righ", "right1"] {
        let refused = client(&server).await.push(with_token(push(0, 1), token)).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated, "{token}");
    }
    let refused = client(&server).await.push(Request::new(push(0, 1))).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
}

#[tokio::test]
async fn bad_requests_are_named() {
    let server = server();
    server.freeze().unwrap();
    let other_version = proto::PageRequest { protocol_version: 2, ..demand(0, 1) };
    let no_range = proto::PageRequest { range: None, ..demand(0, 1) };
    for (request, code, word) in [
        (other_version, Code::FailedPrecondition, "protocol_version"),
        (no_range, Code::InvalidArgument, "range"),
        (demand(PAGES - 1, 2), Code::InvalidArgument, "range"),
        (demand(u64::MAX, 2), Code::InvalidArgument, "range"),
        (demand(0, 0), Code::InvalidArgument, "range"),
    ] {
        let refused = ask(&server, vec![request]).await.unwrap_err();
        assert_eq!(refused.code(), code, "{request:?}");
        assert!(refused.message().contains(word), "{refused:?}");
    }
    let refused = client(&server).await.push(with_token(push(PAGES, 1), "right")).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn an_error_after_the_good_copy_was_sent_is_counted_as_healed() {
    let server = server();
    server.freeze().unwrap();
    ask(&server, vec![demand(1, 2)]).await.unwrap();
    let outcome = server.mark_poisoned(&[error(1, false), error(9, false), error(9, false)]);
    assert_eq!(outcome, MarkOutcome { marked: 2, already: 1, healed: 1 });
    // Asked for again, it is not read again: what was good once may be bad now.
    assert_eq!(kinds(&ask(&server, vec![demand(1, 1)]).await.unwrap()), [(1, 1, "poison")]);
}
