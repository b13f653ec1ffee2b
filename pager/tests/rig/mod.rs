//! A pager, a VMM and a source in one test process. The VMM's threads touch memory through `write(2)` into a pipe:
//! the fault waits in the kernel as a vCPU's would, and a poison marker gives `EFAULT` instead of a signal.

mod source;
mod vmm;

use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use vmferry_pager::internals::{Backing, MemoryLayout, Tuning, needed_features, probe, serve_vm};
use vmferry_pager::proto::{self, PagerRole, pager_client::PagerClient, pager_event::Event};
use vmferry_patience::patient;

pub use source::{Answer, StandIn};
pub use vmm::Vmm;

pub const PAGE: u64 = 4096;
/// Long enough for any machine; a test that meets it has found a page that does not arrive.
pub static PATIENCE: LazyLock<Duration> = LazyLock::new(|| patient(30.0));

/// What fills the page in the source.
pub fn byte_of(page: u64) -> u8 {
    (page % 251) as u8 + 1
}

pub fn layout(backing: Backing, pages: u64) -> proto::MemoryLayout {
    let backing = match backing {
        Backing::Anonymous => proto::Backing::Anonymous,
        Backing::Memfd => proto::Backing::Memfd,
    };
    let region = proto::MemoryRegion { gpa: 0, size: pages * PAGE, page_size: PAGE, backing: backing.into() };
    proto::MemoryLayout { regions: vec![region] }
}

pub async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + *PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "not in {:?}: {what}", *PATIENCE);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub struct Rig {
    pub control: PagerClient<Channel>,
    pub vmm: Vmm,
    pub source: StandIn,
    pub timeout: Duration,
    pager: std::thread::JoinHandle<std::io::Result<()>>,
    directory: tempfile::TempDir,
    seen: u64,
}

/// Connects to a pager as its daemon does, as soon as it listens.
pub async fn control(socket: PathBuf) -> PagerClient<Channel> {
    eventually("the pager listens", async || socket.exists()).await;
    let connect = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(hyper_util::rt::TokioIo::new) }
    });
    PagerClient::new(Endpoint::from_static("http://pager").connect_with_connector(connect).await.unwrap())
}

/// Runs a pager on a thread of its own.
pub fn pager(directory: &Path, role: PagerRole, tuning: Tuning) -> std::thread::JoinHandle<std::io::Result<()>> {
    let directory = directory.to_path_buf();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(serve_vm(directory, "web-1".into(), role, tuning))
    })
}

impl Rig {
    /// A destination with its memory attached; `None` (and the reason printed) where there is no userfaultfd.
    pub async fn start(backing: Backing, pages: u64, plan: fn(u64) -> Answer) -> Option<Self> {
        Self::start_tuned(backing, pages, plan, Tuning::default()).await
    }

    /// The same, of a pager that is tuned.
    pub async fn start_tuned(backing: Backing, pages: u64, plan: fn(u64) -> Answer, tuning: Tuning) -> Option<Self> {
        let layout = layout(backing, pages);
        if let Err(reason) = probe(needed_features(&MemoryLayout::try_from(&layout).unwrap())) {
            eprintln!("skipped: {reason}");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let pager = pager(directory.path(), PagerRole::Destination, tuning);
        let mut control = control(directory.path().join("pager.sock")).await;
        let expect = proto::ExpectDestinationRequest { layout: Some(layout) };
        control.expect_destination(expect).await.unwrap();
        let vmm = Vmm::attach(&directory.path().join("memory.sock"), backing, pages);
        let source = StandIn::start(plan);
        let timeout = patient(20.0);
        Some(Self { control, vmm, source, timeout, pager, directory, seen: 0 })
    }

    pub async fn connect(&mut self) -> Result<(), tonic::Status> {
        self.connect_to(self.source.address()).await
    }

    pub async fn connect_to(&mut self, lane_address: String) -> Result<(), tonic::Status> {
        let demand_timeout_s = self.timeout.as_secs_f64();
        let request = proto::ConnectLanesRequest {
            lane_address,
            token: source::TOKEN.into(),
            demand_timeout_s,
            connect_timeout_s: 10.0,
        };
        self.control.connect_lanes(request).await.map(|_| ())
    }

    /// Memory for these pages of the first region is allocated ahead.
    pub async fn preallocate(&mut self, page: u64, count: u64) {
        let held = vec![proto::PageRange { region: 0, page, count }];
        let reply = self.control.preallocate(proto::PreallocateRequest { held }).await.unwrap().into_inner();
        assert_eq!(reply.bytes, count * PAGE);
    }

    pub async fn push(&mut self) -> Result<(), tonic::Status> {
        self.control.start_push(proto::StartPushRequest { lanes: 0 }).await.map(|_| ())
    }

    pub async fn progress(&self) -> proto::PageProgress {
        let mut control = self.control.clone();
        control.get_status(proto::GetStatusRequest {}).await.unwrap().into_inner().progress.unwrap()
    }

    /// The first event after the last one returned that answers `wanted`.
    pub async fn event(&mut self, wanted: impl Fn(&Event) -> bool) -> Event {
        let request = proto::WatchEventsRequest { after: self.seen };
        let mut events = self.control.watch_events(request).await.unwrap().into_inner();
        let mut last = self.seen;
        loop {
            let next = tokio::time::timeout(*PATIENCE, events.message()).await.expect("no such event");
            let event = next.unwrap().unwrap();
            assert_eq!(event.number, last + 1, "events are numbered without gaps");
            last = event.number;
            let event = event.event.unwrap();
            if wanted(&event) {
                self.seen = last;
                return event;
            }
        }
    }

    /// Shuts the pager down; it leaves nothing behind.
    pub async fn end(mut self) {
        self.control.shutdown(proto::ShutdownRequest { even_if_guest_dies: true }).await.unwrap();
        let pager = self.pager;
        eventually("the pager ends", async || pager.is_finished()).await;
        pager.join().unwrap().unwrap();
        let left: Vec<_> = std::fs::read_dir(self.directory.path()).unwrap().map(|e| e.unwrap().path()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}
