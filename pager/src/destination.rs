//! The page path's thread of a destination, and how the control service talks to it.
//!
//! The thread owns the page table, the userfaultfd and the lanes; everybody else sends it [`Command`]s. Nothing else
//! changes the state of a page.

use std::os::fd::AsRawFd;
use std::path::Path;

use tokio::sync::oneshot;
use tonic::Status;

use crate::attached::AttachedFile;
use crate::bulk::Bulk;
use crate::commands::{Command, Commands};
use crate::events::EventLog;
use crate::fault_loop::FaultLoop;
use crate::landing::Landing;
use crate::lane::PAGE;
use crate::lane::connect::Source;
use crate::page_file::PageFileError;
use crate::page_table::PageTable;
use crate::placement::Numbering;
use crate::proto::PageRange;
use crate::region_map::{Backing, Layout, Region};
use crate::resolver::Resolver;
use crate::tuning::Tuning;
use crate::userfaultfd::feature;

/// The features that a VMM must ask for in `UFFDIO_API`, given its layout.
pub fn needed_features(layout: &Layout) -> u64 {
    let needs = |wanted: fn(&crate::region_map::Region) -> bool| layout.regions().iter().any(wanted);
    let mut features = feature::EVENT_REMOVE | feature::THREAD_ID | feature::POISON;
    if needs(|r| r.backing == Backing::Memfd && r.page_size == PAGE) {
        features |= feature::MISSING_SHMEM | feature::MINOR_SHMEM;
    }
    if needs(|r| r.page_size > PAGE) {
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
    pub fn start(layout: &Layout, pages: &Path, events: EventLog, tuning: &Tuning) -> Result<Self, DestinationError> {
        let (table, existed) = PageTable::open(pages, layout)?;
        tracing::info!(existed, pages = table.total(), missing = table.counts().missing(), "pager.page_table");
        let (commands, receiver, doorbell) = Commands::new().map_err(DestinationError::Thread)?;
        let numbering = Numbering::new(layout);
        let (to_self, runtime) = (commands.clone(), tokio::runtime::Handle::current());
        let tuning = tuning.clone();
        let run = move || {
            tuning.enter_page_path();
            let resolver = Resolver::new(numbering, table, events.clone());
            let bulk = Bulk::new(to_self, runtime);
            FaultLoop::new(resolver, events, receiver, doorbell, bulk, tuning).run();
        };
        std::thread::Builder::new().name("page-path".into()).spawn(run).map_err(DestinationError::Thread)?;
        Ok(Self { commands })
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
    pub async fn connect(&self, source: Source) -> Result<(), Status> {
        let asked = source.clone();
        if !self.ask(|answer| Command::MayConnect(asked, answer)).await?? {
            return Ok(());
        }
        let reached = source.reach().await?;
        let stream = reached.clone().urgent().await?;
        self.ask(|answer| Command::Connected(reached, stream, answer)).await
    }

    /// Allocates memory of the host for these ranges of 4 KiB pages, as far as they are in files to which pages are written;
    /// returns for how many bytes that is done.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT`: outside the layout. `RESOURCE_EXHAUSTED`: this host has not so much memory.
    /// `FAILED_PRECONDITION`: no memory is attached, lanes were connected before, or it is under way already.
    pub async fn preallocate(&self, layout: &Layout, held: Vec<PageRange>) -> Result<u64, Status> {
        let files = self.ask(Command::Allocate).await??;
        let (layout, commands) = (layout.clone(), self.commands.clone());
        let work = tokio::task::spawn_blocking(move || {
            let mut landings: Vec<_> = files.iter().zip(layout.regions()).map(landing).collect();
            let allocated = allocate(&layout, &files, &held, &mut landings);
            commands.send(Command::Allocated(landings));
            allocated
        });
        work.await.map_err(|e| Status::internal(e.to_string()))?
    }
}

/// Bytes that are allocated by one call, so that none takes long.
const ALLOCATED_AT_ONCE: u64 = 64 << 20;

fn landing((file, region): (&Option<AttachedFile>, &Region)) -> Option<Landing> {
    let landing = Landing::new(file.as_ref()?, region.size);
    landing.inspect_err(|error| tracing::info!(%error, gpa = region.gpa.0, "pager.no_landing")).ok()
}

/// Allocates memory (fallocate(2) says what is lacking), and makes it ready to be received into, where there is a landing.
fn allocate(
    layout: &Layout,
    files: &[Option<AttachedFile>],
    held: &[PageRange],
    landings: &mut [Option<Landing>],
) -> Result<u64, Status> {
    let pieces = layout.in_pages_of(PAGE);
    let mut bytes = 0;
    for range in held {
        let PageRange { region, page, count } = *range;
        if !pieces.contains(region, page, count) {
            return Err(Status::invalid_argument(format!("held: region {region}, pages {page} + {count} of 4 KiB")));
        }
        let Some(Some(file)) = files.get(region as usize) else { continue };
        let (mut at, end) = (page * PAGE, (page + count) * PAGE);
        while at < end {
            let size = (end - at).min(ALLOCATED_AT_ONCE);
            let (fd, from) = (file.fd.as_raw_fd(), file.offset + at);
            // SAFETY: no memory is passed.
            if unsafe { libc::fallocate(fd, 0, from as libc::off_t, size as libc::off_t) } != 0 {
                let error = std::io::Error::last_os_error();
                if error.kind() == std::io::ErrorKind::Interrupted {
                    continue;
                }
                let gpa = pieces.regions()[region as usize].gpa.0 + at;
                let message = format!("no memory for {size:#x} bytes of the guest from {gpa:#x} on: {error}");
                return Err(Status::resource_exhausted(message));
            }
            let landing = &mut landings[region as usize];
            if let Some(Err(error)) = landing.as_mut().map(|landing| landing.prepare(at / PAGE, size / PAGE)) {
                tracing::info!(%error, region, "pager.no_landing");
                *landing = None;
            }
            at += size;
            bytes += size;
        }
    }
    Ok(bytes)
}
