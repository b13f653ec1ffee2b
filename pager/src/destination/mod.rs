//! The destination's side: the fault thread, the bulk lanes, and how the control service talks to them.
//!
//! The fault thread owns the userfaultfds and the link; everybody else sends it [`Command`]s. It and the threads of bulk lanes,
//! which it starts and ends, change the state of pages ([`SharedPages`]), and nothing else does.

pub mod command;
pub mod error;
mod fault_loop;
mod lanes;
mod link;
pub mod memory;
pub mod page_table;
pub mod pages;

use std::path::Path;
use std::sync::Arc;

use tokio::sync::oneshot;

use crate::destination::command::{Command, Commands};
use crate::destination::error::{ConnectLanesError, DestinationError, Ended};
use crate::destination::fault_loop::FaultLoop;
use crate::destination::lanes::bulk_lanes::BulkLanes;
use crate::destination::link::{Link, Redial};
use crate::destination::memory::preallocate::{PreallocateError, preallocate};
use crate::destination::page_table::PageTable;
use crate::destination::pages::resolver::Resolver;
use crate::destination::pages::shared_pages::SharedPages;
use crate::event_log::EventLog;
use crate::lane::connect::SourceAddress;
use crate::layout::PAGE_SIZE;
use crate::layout::address_map::PageNumbering;
use crate::layout::{Backing, MemoryLayout};
use crate::proto::PageRange;
use crate::sched::fault_thread::FaultThread;
use crate::sys::userfaultfd::feature;
use crate::tuning::Tuning;

/// The features that a VMM must request in `UFFDIO_API`, given its layout.
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

/// The kernel names of features.
pub fn feature_names(features: u64) -> Vec<String> {
    feature::NAMES.iter().filter(|(bit, _)| features & bit != 0).map(|(_, name)| (*name).to_owned()).collect()
}

/// A handle of the fault thread; clones address the same one.
#[derive(Debug, Clone)]
pub struct Destination {
    commands: Commands,
    tuning: Arc<Tuning>,
}

impl Destination {
    /// Opens the page table (or makes it) and starts the fault thread. Lanes are connected on the calling runtime.
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
        let redial = redial(commands.clone(), runtime.clone(), tuning.clone());
        let run = move || {
            let thread = FaultThread::enter(&of_loop.page_path_cpus, of_loop.spin, of_loop.real_time);
            let shared = Arc::new(SharedPages::new(Resolver::new(numbering, table, events.clone())));
            let keep_awake = of_loop.keep_awake;
            let send = Arc::new(move |event| to_self.send(Command::Bulk(event)));
            let bulk = BulkLanes::new(send, runtime, shared.clone(), of_loop);
            let link = Link::new(shared.clone(), events.clone(), bulk, redial);
            FaultLoop::new(shared, events, (receiver, doorbell), link, thread, keep_awake).run();
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
    /// [`Ended`].
    pub async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Ended> {
        let (sender, answer) = oneshot::channel();
        self.send(command(sender));
        answer.await.map_err(|_| Ended)
    }

    /// Connects the urgent lane; faults are answered from then on.
    ///
    /// # Errors
    /// [`ConnectLanesError`].
    pub async fn connect(&self, source: SourceAddress) -> Result<(), ConnectLanesError> {
        let asked = source.clone();
        if !self.ask(|answer| Command::MayConnect(asked, answer)).await?? {
            return Ok(());
        }
        let source = source.reach(&self.tuning.congestion_control).await?;
        let stream = source.clone().urgent().await?;
        Ok(self.ask(|answer| Command::Connected(source, stream, answer)).await?)
    }

    /// Allocates memory of the host for these ranges of 4 KiB pages, where they lie in files to which pages are written.
    /// Returns the number of bytes allocated.
    ///
    /// # Errors
    /// [`PreallocateError`].
    pub async fn preallocate(&self, layout: &MemoryLayout, held: Vec<PageRange>) -> Result<u64, PreallocateError> {
        let targets = self.ask(Command::Allocate).await.map_err(|Ended| PreallocateError::Ended)??;
        let (layout, commands, huge_pages) = (layout.clone(), self.commands.clone(), self.tuning.huge_pages);
        let work = tokio::task::spawn_blocking(move || {
            let (receive_mappings, allocated) = preallocate(&layout, &targets, &held, huge_pages);
            commands.send(Command::Allocated(receive_mappings));
            allocated
        });
        work.await.map_err(|_| PreallocateError::Ended)?
    }
}

/// Connects once more to a source on the runtime; the fault thread gets the result as a command.
fn redial(commands: Commands, runtime: tokio::runtime::Handle, tuning: Arc<Tuning>) -> Redial {
    Box::new(move |address| {
        let (commands, tuning) = (commands.clone(), tuning.clone());
        runtime.spawn(async move {
            let connect = async {
                let source = address.reach(&tuning.congestion_control).await?;
                let stream = source.clone().urgent().await?;
                Ok((source, stream))
            };
            commands.send(Command::Redialled(connect.await));
        });
    })
}
