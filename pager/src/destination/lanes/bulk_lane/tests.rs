//! A lane is closed whatever its frame waits for.

use std::io::Write;
use std::net::TcpListener;
use std::sync::mpsc::{self, Receiver};

use vmferry_patience::patient;

use super::*;
use crate::destination::page_table::PageTable;
use crate::destination::pages::resolver::Resolver;
use crate::event_log::EventLog;
use crate::lane::frame::{FrameHeader, FrameKind};
use crate::layout::address_map::PageNumbering;
use crate::layout::{Backing, Gpa, MemoryLayout, Region};

const PAGES: u64 = 4;

/// A lane into pages that no VMM has attached: no frame of it can be installed.
fn lane_into_nothing() -> (BulkLane, TcpStream, Receiver<LaneReport>, tempfile::TempDir) {
    let size = PAGES * PAGE_SIZE;
    let region = Region { gpa: Gpa(0), size, page_size: PAGE_SIZE, backing: Backing::Anonymous };
    let layout = MemoryLayout::new(vec![region]).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let (table, _) = PageTable::open(&directory.path().join("pages"), &layout).unwrap();
    let resolver = Resolver::new(PageNumbering::new(&layout), table, EventLog::default());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let source = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (say, said) = mpsc::channel();
    let tell = move |report| drop(say.send(report));
    let accepted = listener.accept().unwrap().0;
    let lane = BulkLane::start(accepted, Arc::new(SharedPages::new(resolver)), Tuning::default(), tell).unwrap();
    (lane, source, said, directory)
}

#[test]
fn lane_whose_frame_cannot_be_installed_is_closed_at_once_and_says_why_once() {
    let (lane, mut source, said, _directory) = lane_into_nothing();
    let header = FrameHeader { kind: FrameKind::Data, region: 0, page: 1, count: 1 };
    source.write_all(&[header.encode().as_slice(), &[7; PAGE_SIZE as usize]].concat()).unwrap();
    let report = said.recv_timeout(patient(10.0)).unwrap();
    assert!(matches!(report, LaneReport::Stopped(Stop::ProcessGone)), "{report:?}");
    let (done, closed) = mpsc::channel();
    std::thread::sleep(20 * INSTALL_RETRY_DELAY);
    std::thread::spawn(move || {
        drop(lane);
        done.send(()).unwrap();
    });
    assert_eq!(closed.recv_timeout(patient(10.0)), Ok(()), "the lane's thread does not end");
    assert!(said.try_recv().is_err(), "the same reason is said once");
}
