//! The pager of one VM on one side: shared by the control service and the memory socket.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex as Short, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Mutex, oneshot, watch};
use tonic::service::Routes;

use crate::destination::command::{Command, Snapshot};
use crate::destination::{Destination, feature_names, needed_features};
use crate::event_log::EventLog;
use crate::lane::set_congestion_control;
use crate::layout::MemoryLayout;
use crate::pager_error::{AttachMemoryError, PagerError};
use crate::proto::pager_event::Event;
use crate::proto::{FailedEvent, LinkState, MemoryAttachedEvent, MemoryDetachedEvent, PagerRole, PagerStatus};
use crate::source::SourceServer;
use crate::source::lanes::listener;
use crate::sys::other_process;
use crate::sys::uffd_probe::probe;
use crate::tuning::Tuning;
use crate::vmm::attached_memory::AttachedMemory;
use crate::vmm::handshake::Expected;
use crate::vmm::notifier::VmmNotifier;

/// How long a daemon has to read the last events of a pager that ends by itself.
const LAST_EVENTS: Duration = Duration::from_secs(2);

/// A source that serves lanes.
#[derive(Debug)]
pub struct ServingSource {
    /// Serves pages.
    pub server: SourceServer,
    /// Where lanes connect.
    pub address: SocketAddr,
    token: String,
    /// Dropping it ends the service.
    _stop: oneshot::Sender<()>,
}

/// The pager's configuration.
#[derive(Debug)]
pub enum Mode {
    /// Nothing yet.
    Unconfigured,
    /// Serves pages.
    Source(ServingSource),
    /// Takes pages.
    Destination(MemoryLayout, Destination),
}

/// The VMM's memory connection.
#[derive(Debug, Clone, Default)]
pub struct MemoryStatus {
    /// A VMM is attached.
    pub attached: bool,
    /// Its process; that of the last one after it hung up.
    pub vmm_pid: u32,
    /// Why one was refused or lost.
    pub reason: String,
}

/// The pager of one VM on one side.
#[derive(Debug)]
pub struct Pager {
    /// Name of the VM.
    pub vm: String,
    /// Which side.
    pub role: PagerRole,
    /// `pager.sock`, `memory.sock` and `pages` are there.
    pub directory: PathBuf,
    /// Its events.
    pub events: EventLog,
    /// True once the process is to end.
    end: watch::Sender<bool>,
    tuning: Tuning,
    mode: Mutex<Mode>,
    memory: Short<MemoryStatus>,
}

impl Pager {
    /// Unconfigured.
    pub fn new(vm: String, role: PagerRole, directory: PathBuf, tuning: Tuning) -> Arc<Self> {
        Arc::new(Self {
            vm,
            role,
            directory,
            events: EventLog::default(),
            end: watch::Sender::new(false),
            tuning,
            mode: Mutex::new(Mode::Unconfigured),
            memory: Short::default(),
        })
    }

    fn memory(&self) -> MutexGuard<'_, MemoryStatus> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn requires(&self, role: PagerRole) -> Result<(), PagerError> {
        if self.role == role {
            return Ok(());
        }
        let (is, needs) = (self.role.as_str_name(), role.as_str_name());
        Err(PagerError::Role { is, needs })
    }

    /// The server of a source.
    ///
    /// # Errors
    /// [`PagerError`]: not a source, or not configured.
    pub async fn server(&self) -> Result<SourceServer, PagerError> {
        self.requires(PagerRole::Source)?;
        match &*self.mode.lock().await {
            Mode::Source(source) => Ok(source.server.clone()),
            _ => Err(PagerError::Unconfigured { first: "ServeSource" }),
        }
    }

    /// The page path of a destination.
    ///
    /// # Errors
    /// [`PagerError`]: not a destination, or not configured.
    pub async fn destination(&self) -> Result<Destination, PagerError> {
        self.destination_layout().await.map(|(_, destination)| destination)
    }

    /// The page path of a destination, and the layout that it expects.
    ///
    /// # Errors
    /// As [`Pager::destination`].
    pub async fn destination_layout(&self) -> Result<(MemoryLayout, Destination), PagerError> {
        self.requires(PagerRole::Destination)?;
        match &*self.mode.lock().await {
            Mode::Destination(layout, destination) => Ok((layout.clone(), destination.clone())),
            _ => Err(PagerError::Unconfigured { first: "ExpectDestination" }),
        }
    }

    /// Becomes a source: opens a port and serves lanes on a thread of its own, and `grpc` to HTTP/2 connections. Repeated: the
    /// same address.
    ///
    /// # Errors
    /// [`PagerError`]: not a source, configured otherwise, no free port.
    pub async fn serve_source(
        &self,
        layout: MemoryLayout,
        ip: IpAddr,
        ports: std::ops::Range<u16>,
        token: String,
        push_bytes_per_s: u64,
        grpc: impl FnOnce(SourceServer) -> Routes,
    ) -> Result<SocketAddr, PagerError> {
        self.requires(PagerRole::Source)?;
        let mut mode = self.mode.lock().await;
        if let Mode::Source(source) = &*mode {
            return match *source.server.layout() == layout && source.token == token && source.address.ip() == ip {
                true => Ok(source.address),
                false => Err(PagerError::ServesOther(source.address)),
            };
        }
        let listener = listen(ip, ports)?;
        set_congestion_control(&listener, &self.tuning.congestion_control);
        let address = listener.local_addr().map_err(PagerError::LocalAddress)?;
        let server = SourceServer::new(layout, token.clone(), push_bytes_per_s, self.tuning.clone());
        let (stop, stopped) = oneshot::channel();
        let (serving, grpc, events) = (server.clone(), grpc(server.clone()), self.events.clone());
        let run = move || {
            let outcome = tokio::runtime::Builder::new_current_thread().enable_all().build().and_then(|runtime| {
                runtime.block_on(async {
                    let listener = tokio::net::TcpListener::from_std(listener)?;
                    listener::accept(serving, grpc, listener, async { drop(stopped.await) }).await
                })
            });
            if let Err(error) = outcome {
                events.append(Event::Failed(FailedEvent { reason: format!("lanes at {address}: {error}") }));
            }
        };
        let spawned = std::thread::Builder::new().name("lanes".into()).spawn(run);
        spawned.map_err(PagerError::Thread)?;
        *mode = Mode::Source(ServingSource { server, address, token, _stop: stop });
        Ok(address)
    }

    /// Becomes a destination. Repeated: the same features.
    ///
    /// # Errors
    /// [`PagerError`]: not a destination, the kernel lacks something, a foreign page table, another layout before.
    pub async fn expect_destination(&self, layout: MemoryLayout) -> Result<Vec<String>, PagerError> {
        self.requires(PagerRole::Destination)?;
        let features = needed_features(&layout);
        let mut mode = self.mode.lock().await;
        if let Mode::Destination(expected, _) = &*mode {
            return match *expected == layout {
                true => Ok(feature_names(features)),
                false => Err(PagerError::ExpectsOther),
            };
        }
        probe(features)?;
        let started =
            Destination::start(&layout, &self.directory.join("pages"), self.events.clone(), self.tuning.clone());
        let destination = started?;
        *mode = Mode::Destination(layout, destination);
        Ok(feature_names(features))
    }

    /// The memory that a VMM must hand over; `None` before the pager is configured.
    pub async fn expected(&self) -> Option<Expected> {
        let (destination, layout) = match &*self.mode.lock().await {
            Mode::Unconfigured => return None,
            Mode::Source(source) => (false, source.server.layout().clone()),
            Mode::Destination(layout, _) => (true, layout.clone()),
        };
        Some(Expected { vm: self.vm.clone(), destination, layout })
    }

    /// Takes the VMM's memory and tells it so.
    ///
    /// # Errors
    /// [`AttachMemoryError`].
    pub async fn attach(&self, memory: AttachedMemory, notifier: Option<VmmNotifier>) -> Result<(), AttachMemoryError> {
        let vmm_pid = memory.vmm_pid;
        let destination = match &*self.mode.lock().await {
            Mode::Unconfigured => return Err(AttachMemoryError::Unexpected),
            Mode::Source(source) => {
                source.server.attach(memory)?;
                None
            }
            Mode::Destination(_, destination) => Some((destination.clone(), memory)),
        };
        match destination {
            None => {
                // Before the VMM is told: a process that it tells in turn finds the memory attached.
                self.attached(vmm_pid);
                notifier.map_or(Ok(()), |notifier| notifier.attached()).map_err(AttachMemoryError::Unanswered)
            }
            Some((destination, memory)) => {
                destination.ask(|answer| Command::Attach(memory, notifier, answer)).await??;
                self.attached(vmm_pid);
                Ok(())
            }
        }
    }

    fn attached(&self, vmm_pid: u32) {
        *self.memory() = MemoryStatus { attached: true, vmm_pid, reason: String::new() };
        self.events.append(Event::MemoryAttached(MemoryAttachedEvent { vmm_pid }));
        tracing::info!(vmm_pid, "pager.memory_attached");
    }

    /// Whether a VMM is attached.
    pub fn is_attached(&self) -> bool {
        self.memory().attached
    }

    /// A VMM was refused.
    pub fn refused(&self, reason: String) {
        tracing::warn!(reason, "pager.memory_refused");
        self.memory().reason = reason;
    }

    /// The attached VMM hung up.
    pub async fn detached(&self, reason: String) {
        tracing::warn!(reason, "pager.memory_detached");
        {
            let mut memory = self.memory();
            memory.attached = false;
            memory.reason.clone_from(&reason);
        }
        if let Ok(destination) = self.destination().await {
            destination.send(Command::HangUp);
        }
        self.events.append(Event::MemoryDetached(MemoryDetachedEvent { reason }));
    }

    /// A pidfd of the attached VMM. `None`: it has ended already.
    pub fn vmm_process(&self) -> Option<OwnedFd> {
        other_process::open(self.memory().vmm_pid).ok()
    }

    /// Ends a destination with all pages present once its VMM has ended: it guards nobody then, and no daemon may be there to
    /// end it. A daemon that is there has time to read the last events.
    pub async fn end_after(&self, vmm: Option<OwnedFd>) {
        if let Some(vmm) = vmm
            && let Err(error) = other_process::ended(vmm).await
        {
            tracing::warn!(%error, "pager.vmm_not_watched");
            return;
        }
        tokio::time::sleep(LAST_EVENTS).await;
        let complete = matches!(self.snapshot().await, Ok(Some(Snapshot { progress, .. })) if progress.absent == 0);
        if complete && !self.is_attached() {
            tracing::info!("pager.ends_with_vmm");
            self.shut_down().await;
        }
    }

    /// The answer to GetStatus.
    ///
    /// # Errors
    /// [`PagerError::Ended`].
    pub async fn status(&self) -> Result<PagerStatus, PagerError> {
        let memory = self.memory().clone();
        let mut status = PagerStatus {
            vm: self.vm.clone(),
            role: self.role.into(),
            pid: std::process::id(),
            memory_attached: memory.attached,
            vmm_pid: memory.vmm_pid,
            memory_reason: memory.reason,
            link: LinkState::Idle.into(),
            newest_event: self.events.newest(),
            ..PagerStatus::default()
        };
        if let Ok(server) = self.server().await {
            status.frozen = server.is_frozen();
            (status.pages_served, status.bytes_served) = server.served();
        }
        if let Mode::Source(source) = &*self.mode.lock().await {
            status.lane_address = source.address.to_string();
        }
        if let Some(snapshot) = self.snapshot().await? {
            status.all_present = snapshot.progress.absent == 0;
            status.link = snapshot.link.into();
            status.link_reason = snapshot.link_reason;
            status.progress = Some(snapshot.progress);
        }
        Ok(status)
    }

    async fn snapshot(&self) -> Result<Option<Snapshot>, PagerError> {
        match self.destination().await {
            Ok(destination) => Ok(Some(destination.ask(Command::Snapshot).await?)),
            Err(_) => Ok(None),
        }
    }

    /// Why ending now would harm a guest; `None` if it would not.
    pub async fn guards(&self) -> Option<String> {
        let progress = self.snapshot().await.ok().flatten()?.progress;
        // Before a VMM attached there is no guest.
        if self.memory().vmm_pid == 0 || (progress.absent == 0 && progress.poison == 0) {
            return None;
        }
        Some(format!("{} pages are absent and {} poisoned ones are guarded", progress.absent, progress.poison))
    }

    /// Ends the process: the page table goes with it.
    pub async fn shut_down(&self) {
        if let Ok(destination) = self.destination().await {
            let _ = destination.ask(Command::End).await;
        }
        self.end.send_replace(true);
    }

    /// Waits until the process is to end.
    pub async fn ended(&self) {
        let _ = self.end.subscribe().wait_for(|end| *end).await;
    }
}

fn listen(ip: IpAddr, ports: std::ops::Range<u16>) -> Result<TcpListener, PagerError> {
    let mut last = None;
    for port in ports.clone() {
        match TcpListener::bind((ip, port)).and_then(|l| l.set_nonblocking(true).map(|()| l)) {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => last = Some(error),
            Err(source) => return Err(PagerError::Listen { at: SocketAddr::new(ip, port), source }),
        }
    }
    let why = last.map_or_else(|| "the range is empty".to_owned(), |e| e.to_string());
    Err(PagerError::NoPort { ip, ports, why })
}
