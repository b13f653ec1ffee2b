//! The source's side of `Pages`: answers what a destination asks, from memory that stands still.
//!
//! ```text
//!  control ──▶ SourceServer ◀── lane thread (demand)     one thread and one connection a lane, so that
//!              (shared state) ◀── lane thread (push) …     the push never stands before a demand
//! ```
//!
//! A page is answered as poison when it is known to be (ledger) or cannot be read (`EIO`, `EFAULT`, marker), and from
//! then on for ever. Nothing is read unless the VM is frozen: a running VM's memory would be torn.

mod lanes;
mod poison_map;
pub mod push_order;

use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::net::TcpListener;
use tonic::Status;

use crate::attached::AttachedMemory;
use crate::guest_memory::{Found, GuestMemory, ReadError};
use crate::proto;
use crate::region_map::{Gpa, Layout, PageId};

pub use lanes::TOKEN_KEY;
use poison_map::PoisonMap;
use push_order::PageRun;

/// Version of pages.proto that this program speaks.
pub const PROTOCOL_VERSION: u32 = 1;

/// Most bytes that one demand may ask for.
const MAX_DEMAND_BYTES: u64 = 4 << 20;

/// Why the source cannot do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Freeze came before the VMM attached its memory.
    #[error("the VMM has not attached its memory")]
    NotAttached,
    /// The attached memory cannot be read.
    #[error(transparent)]
    Memory(#[from] ReadError),
}

/// What became of errors that were told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MarkOutcome {
    /// Newly known pages.
    pub marked: u64,
    /// Known before.
    pub already: u64,
    /// Of those newly known: the good copy was sent before, so the destination may have it.
    pub healed: u64,
}

/// A VM's memory, served to its destination. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub struct SourceServer(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    layout: Layout,
    token: String,
    memory: Mutex<Option<Arc<GuestMemory>>>,
    frozen: AtomicBool,
    poison: Mutex<PoisonMap>,
    /// A bit a page, by region: its contents were sent.
    sent: Vec<Vec<AtomicU64>>,
    latest_demand: Mutex<Option<PageId>>,
    pages_served: AtomicU64,
    bytes_served: AtomicU64,
}

impl SourceServer {
    /// Serves nothing until memory is attached and the VM frozen.
    pub fn new(layout: Layout, token: String) -> Self {
        let bits = |pages: u64| (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let sent = layout.regions().iter().map(|region| bits(region.pages())).collect();
        Self(Arc::new(Shared {
            layout,
            token,
            memory: Mutex::default(),
            frozen: AtomicBool::new(false),
            poison: Mutex::default(),
            sent,
            latest_demand: Mutex::default(),
            pages_served: AtomicU64::new(0),
            bytes_served: AtomicU64::new(0),
        }))
    }

    /// The layout that is served.
    pub fn layout(&self) -> &Layout {
        &self.0.layout
    }

    /// The lane token.
    pub fn token(&self) -> &str {
        &self.0.token
    }

    /// Takes the VMM's memory; replaces what was attached before.
    ///
    /// # Errors
    /// [`SourceError::Memory`] if it cannot be read.
    pub fn attach(&self, memory: AttachedMemory) -> Result<(), SourceError> {
        let memory = Arc::new(GuestMemory::new(memory)?);
        *lock(&self.0.memory) = Some(memory);
        Ok(())
    }

    /// The vCPUs stand still: pages are served from now on.
    ///
    /// # Errors
    /// [`SourceError::NotAttached`].
    pub fn freeze(&self) -> Result<(), SourceError> {
        if lock(&self.0.memory).is_none() {
            return Err(SourceError::NotAttached);
        }
        self.0.frozen.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// The vCPUs may run again: every lane ends at its next page.
    pub fn thaw(&self) {
        self.0.frozen.store(false, Ordering::SeqCst);
    }

    /// Whether pages are served.
    pub fn is_frozen(&self) -> bool {
        self.0.frozen.load(Ordering::SeqCst)
    }

    /// Pages that are known to be bad, answered as poison from now on. Errors outside the layout do not count.
    pub fn mark_poisoned(&self, errors: &[proto::MemoryError]) -> MarkOutcome {
        let mut outcome = MarkOutcome::default();
        for error in errors {
            let poison = proto::Poison { origin: error.origin, guest_visible: error.guest_visible, hop: error.hop };
            for id in self.0.layout.pages_of_block(Gpa(error.gpa), error.lsb) {
                if !lock(&self.0.poison).add(id, poison) {
                    outcome.already += 1;
                    continue;
                }
                outcome.marked += 1;
                outcome.healed += u64::from(self.0.was_sent(id));
            }
        }
        outcome
    }

    /// Pages and bytes of contents served so far.
    pub fn served(&self) -> (u64, u64) {
        (self.0.pages_served.load(Ordering::Relaxed), self.0.bytes_served.load(Ordering::Relaxed))
    }

    /// Accepts lanes until `stop`; each gets a thread of its own.
    ///
    /// # Errors
    /// When a lane's thread cannot be started or the listener fails for good.
    pub async fn serve(self, listener: TcpListener, stop: impl Future<Output = ()>) -> std::io::Result<()> {
        lanes::accept(self, listener, stop).await
    }

    /// Answers one demand: every page of it exactly once.
    fn answer(&self, request: &proto::PageRequest) -> Result<proto::PageReply, Status> {
        check_version(request.protocol_version)?;
        let range = request.range.ok_or_else(|| Status::invalid_argument("range: missing"))?;
        let run = self.checked(&range)?;
        let page_size = self.0.layout.regions()[run.region as usize].page_size;
        if run.count > (MAX_DEMAND_BYTES / page_size).max(1) {
            return Err(Status::invalid_argument(format!(
                "range.count: {} pages of {page_size} bytes are more than {MAX_DEMAND_BYTES} bytes",
                run.count
            )));
        }
        *lock(&self.0.latest_demand) = Some(PageId { region: run.region, page: run.page });
        Ok(proto::PageReply { runs: self.0.read(run)? })
    }

    fn checked(&self, range: &proto::PageRange) -> Result<PageRun, Status> {
        let proto::PageRange { region, page, count } = *range;
        if self.0.layout.contains(region, page, count) {
            return Ok(PageRun { region, page, count });
        }
        Err(Status::invalid_argument(format!(
            "range: region {region}, pages {page} + {count} are not in the layout of {} regions",
            self.0.layout.regions().len()
        )))
    }

    fn latest_demand(&self) -> Option<PageId> {
        *lock(&self.0.latest_demand)
    }
}

fn check_version(version: u32) -> Result<(), Status> {
    if version == PROTOCOL_VERSION {
        return Ok(());
    }
    Err(Status::failed_precondition(format!(
        "protocol_version: {version}, this pager speaks {PROTOCOL_VERSION}: run the same release on both hosts"
    )))
}

impl Shared {
    /// Reads a run, known poison first.
    fn read(&self, run: PageRun) -> Result<Vec<proto::Run>, Status> {
        if !self.frozen.load(Ordering::SeqCst) {
            return Err(Status::failed_precondition("the source is not frozen: its vCPUs may run"));
        }
        let memory = lock(&self.memory).clone().ok_or_else(|| Status::failed_precondition("no memory attached"))?;
        let end = run.page + run.count;
        let mut at = run.page;
        let mut runs = Vec::new();
        while at < end {
            let known = lock(&self.poison).first_in(run.region, at..end);
            let good_end = known.map_or(end, |(page, _)| page);
            if at < good_end {
                self.read_good(&memory, PageRun { region: run.region, page: at, count: good_end - at }, &mut runs)?;
            }
            if let Some((page, poison)) = known {
                runs.push(reply(run.region, page, 1, proto::run::Contents::Poison(poison)));
                at = page + 1;
            } else {
                at = good_end;
            }
        }
        self.pages_served.fetch_add(run.count, Ordering::Relaxed);
        Ok(runs)
    }

    /// Reads pages that nothing bad is known of; what turns out poisoned is known from now on.
    fn read_good(&self, memory: &GuestMemory, run: PageRun, runs: &mut Vec<proto::Run>) -> Result<(), Status> {
        let found = memory
            .read(run.region, run.page, run.count)
            .map_err(|error| Status::unavailable(format!("cannot read guest memory: {error}")))?;
        let page_size = self.layout.regions()[run.region as usize].page_size;
        let mut page = run.page;
        for found in found {
            let (count, contents) = match found {
                Found::Data(bytes) => {
                    self.bytes_served.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    (bytes.len() as u64 / page_size, proto::run::Contents::Data(bytes))
                }
                Found::Zero(count) => (count, proto::run::Contents::Zero(proto::Zero {})),
                Found::Poison(count) => {
                    let poison =
                        proto::Poison { origin: proto::ErrorOrigin::Read.into(), guest_visible: false, hop: 0 };
                    let mut known = lock(&self.poison);
                    for page in page..page + count {
                        known.add(PageId { region: run.region, page }, poison);
                    }
                    (count, proto::run::Contents::Poison(poison))
                }
            };
            if !matches!(contents, proto::run::Contents::Poison(_)) {
                self.note_sent(run.region, page, count);
            }
            runs.push(reply(run.region, page, count, contents));
            page += count;
        }
        Ok(())
    }

    fn note_sent(&self, region: u32, page: u64, count: u64) {
        let bits = &self.sent[region as usize];
        for page in page..page + count {
            bits[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::Relaxed);
        }
    }

    fn was_sent(&self, id: PageId) -> bool {
        let word = &self.sent[id.region as usize][(id.page / 64) as usize];
        word.load(Ordering::Relaxed) >> (id.page % 64) & 1 == 1
    }
}

fn reply(region: u32, page: u64, count: u64, contents: proto::run::Contents) -> proto::Run {
    proto::Run { region, page, count, contents: Some(contents) }
}

/// These locks guard plain values that no panic can leave half-changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
