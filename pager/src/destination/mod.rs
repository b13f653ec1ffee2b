//! The page path's thread of a destination, and how the control service talks to it.
//!
//! The thread owns the userfaultfds and the lanes; everybody else sends it [`Command`]s. It and the threads of bulk lanes,
//! which it starts and ends, change the state of pages ([`SharedPages`]), and nothing else does.

pub mod command;
pub mod fault_loop;
pub mod lanes;
pub mod memory;
pub mod page_table;
pub mod pages;

use std::path::Path;
use std::sync::Arc;

use tokio::sync::oneshot;
use tonic::Status;

use crate::destination::command::{Command, Commands};
use crate::destination::fault_loop::FaultLoop;
use crate::destination::lanes::bulk_lanes::BulkLanes;
use crate::destination::memory::preallocate::preallocate;
use crate::destination::page_table::PageTable;
use crate::destination::page_table::file::PageFileError;
use crate::destination::pages::resolver::Resolver;
use crate::destination::pages::shared_pages::SharedPages;
use crate::event_log::EventLog;
use crate::lane::connect::SourceAddress;
use crate::layout::PAGE_SIZE;
use crate::layout::address_map::PageNumbering;
use crate::layout::{Backing, MemoryLayout};
use crate::proto::PageRange;
use crate::sys::userfaultfd::feature;
use crate::tuning::Tuning;

/// The features that a VMM must ask for in `UFFDIO_API`, given its layout.
pub fn needed_features(layout: &MemoryLayout) -> u64 {
    let needs = |wanted: fn(&crate::layout::Region) -> bool| layout.regions().iter().any(wanted);
    let mut features = feature::EVENT_REMOVE | feature::THREAD_ID | feature::POISON;
    if needs(|r| r.backing == Backing::Memfd && r.page_size == PAGE_SIZE) {
        features |= feature::MISSING_SHMEM | feature::MINOR_SHMEM;
    }
    if needs(|r| r.page_size > PAGE_SIZE) {
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
    commands: Commands,
    tuning: Arc<Tuning>,
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
    /// Opens the page table (or makes it) and starts the thread. Lanes are connected on the calling runtime.
    ///
    /// # Errors
    /// [`DestinationError`].
    pub fn start(
        layout: &MemoryLayout,
        pages: &Path,
        events: EventLog,
        tuning: Tuning,
    ) -> Result<Self, DestinationError> {
        let (table, existed) = PageTable::open(pages, layout)?;
        tracing::info!(existed, pages = table.total(), missing = table.counts().missing(), "pager.page_table");
        let (commands, receiver, doorbell) = Commands::new().map_err(DestinationError::Thread)?;
        let numbering = PageNumbering::new(layout);
        let (to_self, runtime) = (commands.clone(), tokio::runtime::Handle::current());
        let (of_loop, tuning) = (tuning.clone(), Arc::new(tuning));
        let run = move || {
            of_loop.enter_page_path();
            let shared = Arc::new(SharedPages::new(Resolver::new(numbering, table, events.clone())));
            let bulk = BulkLanes::new(to_self, runtime, shared.clone(), of_loop.clone());
            FaultLoop::new(shared, events, receiver, doorbell, bulk, of_loop).run();
        };
        std::thread::Builder::new().name("page-path".into()).spawn(run).map_err(DestinationError::Thread)?;
        Ok(Self { commands, tuning })
    }

    /// Sends a command without waiting.
    pub fn send(&self, command: Command) {
        self.commands.send(command);
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

    /// Connects the urgent lane; faults are answered from then on.
    ///
    /// # Errors
    /// `FAILED_PRECONDITION`: no memory is attached. Otherwise what the source said, or that it cannot be reached.
    pub async fn connect(&self, source: SourceAddress) -> Result<(), Status> {
        let asked = source.clone();
        if !self.ask(|answer| Command::MayConnect(asked, answer)).await?? {
            return Ok(());
        }
        let reached = source.reach(self.tuning.clone()).await?;
        let stream = reached.clone().urgent().await?;
        self.ask(|answer| Command::Connected(reached, stream, answer)).await
    }

    /// Allocates memory of the host for these ranges of 4 KiB pages, as far as they are in files to which pages are written;
    /// returns for how many bytes that is done.
    ///
    /// # Errors
    /// Those of [`preallocate`]. `FAILED_PRECONDITION`: no memory is attached, lanes were connected before, or it is under
    /// way already.
    pub async fn preallocate(&self, layout: &MemoryLayout, held: Vec<PageRange>) -> Result<u64, Status> {
        let targets = self.ask(Command::Allocate).await??;
        let (layout, commands, huge_pages) = (layout.clone(), self.commands.clone(), self.tuning.huge_pages);
        let work = tokio::task::spawn_blocking(move || {
            let (receive_mappings, allocated) = preallocate(&layout, &targets, &held, huge_pages);
            commands.send(Command::Allocated(receive_mappings));
            allocated
        });
        work.await.map_err(|e| Status::internal(e.to_string()))?
    }
}
