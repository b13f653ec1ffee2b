//! The page path's thread of a destination, and how the control service talks to it.
//!
//! The thread owns the page table, the userfaultfd and the lanes; everybody else sends it [`Command`]s. Nothing else
//! changes the state of a page.

use std::path::Path;

use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use crate::attached::AttachedMemory;
use crate::demand::Source;
use crate::events::EventLog;
use crate::fault_loop::FaultLoop;
use crate::page_file::PageFileError;
use crate::page_table::PageTable;
use crate::placement::Numbering;
use crate::proto::{LinkState, MarkPoisonedReply, MemoryError, PageProgress};
use crate::region_map::{Backing, Layout};
use crate::resolver::Resolver;
use crate::teller::Teller;
use crate::userfaultfd::feature;

/// What the page path can be asked for. Each is answered once, unless it says otherwise.
#[derive(Debug)]
pub enum Command {
    /// Take the VMM's memory; the VMM is told `attached` if there is a teller. `Err`: why not.
    Attach(AttachedMemory, Option<Teller>, oneshot::Sender<Result<(), String>>),
    /// The VMM's memory connection is closed. No answer.
    HangUp,
    /// Connect the urgent lane.
    Connect(Source, oneshot::Sender<Result<(), Status>>),
    /// Start the push on so many lanes.
    StartPush(usize, oneshot::Sender<Result<(), Status>>),
    /// Unregister what needs no guard.
    Complete(oneshot::Sender<Result<u64, Status>>),
    /// Pages known to be bad.
    MarkPoisoned(Vec<MemoryError>, oneshot::Sender<MarkPoisonedReply>),
    /// Where it stands.
    Look(oneshot::Sender<Snapshot>),
    /// Forget everything: remove the page table and end the thread.
    End(oneshot::Sender<()>),
}

/// Where a destination stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    /// State of the link.
    pub link: LinkState,
    /// Why it is down.
    pub link_reason: String,
    /// The pages.
    pub progress: PageProgress,
}

/// The features that a VMM must ask for in `UFFDIO_API`, given its layout.
pub fn needed_features(layout: &Layout) -> u64 {
    let needs = |wanted: fn(&crate::region_map::Region) -> bool| layout.regions().iter().any(wanted);
    let mut features = feature::EVENT_REMOVE | feature::THREAD_ID | feature::POISON;
    if needs(|r| r.backing == Backing::Memfd) {
        features |= feature::MISSING_SHMEM;
    }
    if needs(|r| r.page_size > 4096) {
        features |= feature::MISSING_HUGETLBFS;
    }
    features
}

/// Their kernel names.
pub fn feature_names(features: u64) -> Vec<String> {
    feature::NAMES.iter().filter(|(bit, _)| features & bit != 0).map(|(_, name)| (*name).to_owned()).collect()
}

/// Speaks to the page path's thread; clones speak to the same one.
#[derive(Debug, Clone)]
pub struct Destination {
    commands: mpsc::UnboundedSender<Command>,
}

/// Why a destination could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DestinationError {
    /// The page table.
    #[error(transparent)]
    Table(#[from] PageFileError),
    /// The thread.
    #[error("page path thread")]
    Thread(#[source] std::io::Error),
}

impl Destination {
    /// Opens the page table (or makes it) and starts the thread.
    ///
    /// # Errors
    /// [`DestinationError`].
    pub fn start(layout: &Layout, pages: &Path, events: EventLog) -> Result<Self, DestinationError> {
        let (table, existed) = PageTable::open(pages, layout)?;
        tracing::info!(existed, pages = table.total(), missing = table.counts().missing(), "pager.page_table");
        let (commands, receiver) = mpsc::unbounded_channel();
        let numbering = Numbering::new(layout);
        let run = move || {
            // The I/O driver is looked at after every second task, so that bulk in hand never hides a fault.
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().event_interval(2).build();
            let outcome = runtime.map(|runtime| {
                let resolver = Resolver::new(numbering, table, events.clone());
                crate::priority::urgent();
                runtime.block_on(FaultLoop::new(resolver, events, receiver).run());
            });
            if let Err(error) = outcome {
                tracing::error!(%error, "pager.page_path_failed");
            }
        };
        std::thread::Builder::new().name("page-path".into()).spawn(run).map_err(DestinationError::Thread)?;
        Ok(Self { commands })
    }

    /// Sends a command without waiting.
    pub fn send(&self, command: Command) {
        let _ = self.commands.send(command);
    }

    /// Sends a command and waits for its answer.
    ///
    /// # Errors
    /// `INTERNAL`: the page path's thread is gone.
    pub async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Status> {
        let (sender, answer) = oneshot::channel();
        self.send(command(sender));
        answer.await.map_err(|_| Status::internal("the page path has ended"))
    }
}
