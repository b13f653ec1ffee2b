//! The requests that take time, and their results. Each runs in a thread that may block, and sends the control loop its
//! result as [`Ended`].

use std::sync::Arc;
use std::sync::mpsc::Sender;

use serde_json::{Value, json};

use crate::layout::RegionSpec;
use crate::machine::{GuestConfig, GuestMemoryError, MachineError, Workload};
use crate::machine_thread::{Commanded, MachineThread};
use crate::memory::{GuestMemory, MemoryError, Transparent};
use crate::options::{MemoryOf, Options};
use crate::pager_link::{AttachError, PagerLink};
use crate::protocol::message::{Poisoned, Prepare, Request, encode_state};
use crate::userfaultfd::{self, Userfaultfd};

/// A guest and its parts. Dropped in this order: the pager hears first, then vCPUs end, then the userfaultfd is closed
/// and the memory unmapped.
#[derive(Debug)]
pub struct Guest {
    /// Connection to the pager.
    pub link: Option<PagerLink>,
    /// The machine.
    pub machine: MachineThread,
    /// A destination's userfaultfds, until the migration is complete: one, or one a region.
    pub uffds: Vec<Arc<Userfaultfd>>,
    /// Its memory.
    pub memory: Arc<GuestMemory>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// The guest's epoch on this host; none before its state is here.
    pub epoch: Option<u64>,
    /// The prepared request, on a destination.
    pub prepared_as: Option<Prepare>,
}

/// The result of a request.
#[derive(Debug)]
pub struct Done {
    /// Fields of the reply.
    pub reply: Value,
    /// The guest that was made.
    pub guest: Option<Guest>,
    /// The connection that was made.
    pub link: Option<PagerLink>,
    /// The epoch that began.
    pub epoch: Option<u64>,
}

impl Default for Done {
    fn default() -> Self {
        Self { reply: json!({}), guest: None, link: None, epoch: None }
    }
}

/// Why a request was not carried out: code, field and text of the answer.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// `BAD_STATE`, `NO_MEMORY`, `UNSUPPORTED`, `FAILED`, `BAD_MESSAGE`.
    pub code: &'static str,
    /// The field to blame, or empty.
    pub field: String,
    /// For people.
    pub message: String,
}

impl Failure {
    /// With all its parts.
    pub fn new(code: &'static str, field: &str, message: String) -> Self {
        Self { code, field: field.into(), message }
    }

    /// `FAILED`, without a field.
    pub fn failed(message: &str) -> Self {
        Self::new("FAILED", "", message.into())
    }
}

impl From<MemoryError> for Failure {
    fn from(error: MemoryError) -> Self {
        match &error {
            MemoryError::Layout(layout) if layout.unsupported => {
                Self::new("UNSUPPORTED", &layout.field, layout.message.clone())
            }
            MemoryError::Layout(layout) => Self::new("BAD_MESSAGE", &layout.field, layout.message.clone()),
            MemoryError::TooLittle { .. } | MemoryError::TooFewHugePages(_) | MemoryError::Refused { .. } => {
                Self::new("NO_MEMORY", "regions", error.to_string())
            }
        }
    }
}

impl From<MachineError> for Failure {
    fn from(error: MachineError) -> Self {
        let code = if matches!(error, MachineError::WrongState { .. }) { "BAD_STATE" } else { "FAILED" };
        let field = if matches!(error, MachineError::BadState(_)) { "state" } else { "" };
        Self::new(code, field, error.to_string())
    }
}

impl From<AttachError> for Failure {
    fn from(error: AttachError) -> Self {
        Self::new("FAILED", "socket", error.to_string())
    }
}

/// How a request ended.
pub type Ended = Box<Result<Done, Failure>>;

/// Runs an operation in a thread of its own.
pub fn in_thread<E: From<Ended> + Send + 'static>(
    events: Sender<E>,
    operation: impl FnOnce() -> Result<Done, Failure> + Send + 'static,
) {
    let ended = events.clone();
    let body = move || drop(ended.send(Box::new(operation()).into()));
    if let Err(error) = std::thread::Builder::new().name("operation".into()).spawn(body) {
        drop(events.send(Box::new(Err(Failure::failed(&format!("no thread: {error}")))).into()));
    }
}

/// Runs a request that is the machine's in its thread.
pub fn on_machine<E: From<Ended> + Send + 'static>(machine: &MachineThread, events: Sender<E>, request: Request) {
    machine.command(move |commanded: &mut Commanded| {
        let done = |()| Done::default();
        let result = match request {
            Request::Stop => commanded.stop().map(done),
            Request::Resume | Request::Start => commanded.run().map(done),
            Request::LoadState { state } => {
                let loaded = commanded.machine().load(&state);
                loaded.map(|epoch| Done { epoch: Some(epoch), ..Done::default() })
            }
            Request::SaveState => {
                let saved = commanded.machine().save();
                saved.map(|state| Done { reply: json!({"state": encode_state(&state)}), ..Done::default() })
            }
            other => Err(MachineError::BadState(format!("{} is not the machine's", other.verb().name()))),
        };
        drop(events.send(Box::new(result.map_err(Failure::from)).into()));
    });
}

/// Attaches a source's memory.
///
/// # Errors
/// [`Failure`] `FAILED`.
pub fn attach<E: From<Poisoned> + Send + 'static>(
    socket: &str,
    vm: &str,
    memory: &GuestMemory,
    events: Sender<E>,
) -> Result<Done, Failure> {
    let link = PagerLink::attach(socket, vm, memory, &[], events)?;
    Ok(Done { link: Some(link), ..Done::default() })
}

/// Makes a destination: memory, userfaultfd over all of it before anything can touch it, machine, and attaches it.
///
/// # Errors
/// [`Failure`]; everything made until then is given back.
pub fn prepare<E: From<Poisoned> + Send + 'static>(
    options: &Options,
    asked: Prepare,
    events: Sender<E>,
    errors: Sender<GuestMemoryError>,
) -> Result<Done, Failure> {
    let features = feature_bits(&asked.uffd_features)?;
    check_memory_of(&options.memory_of, &asked.regions)?;
    let transparent = if options.thp { Transparent::Afterwards } else { Transparent::Never };
    let memory = Arc::new(GuestMemory::with_transparent(&asked.regions, transparent)?);
    let made = |_| {
        Userfaultfd::new(features).map(Arc::new).map_err(|error| {
            let message = format!("userfaultfd with {:?}: {error}", asked.uffd_features);
            Failure::new("UNSUPPORTED", "uffd_features", message)
        })
    };
    let wanted = if options.uffd_per_region { memory.regions().len() } else { 1 };
    let uffds: Vec<_> = (0..wanted).map(made).collect::<Result<_, _>>()?;
    for (region, uffd) in memory.regions().iter().zip(uffds.iter().cycle()) {
        uffd.register(region.hva, region.spec.size, userfaultfd::MODE_MISSING)
            .map_err(|error| Failure::failed(&format!("UFFDIO_REGISTER at {:#x}: {error}", region.hva)))?;
    }
    // The workload comes with the device state.
    let config = GuestConfig { vcpus: asked.vcpus, workload: Workload::Idle, write_percent: 0, seed: 0 };
    let machine = MachineThread::spawn(options.accel.make(), Arc::clone(&memory), config, errors)?;
    let link = PagerLink::attach(&asked.socket, &options.vm, &memory, &uffds, events)?;
    let vcpus = asked.vcpus;
    let guest = Guest { memory, machine, vcpus, epoch: None, uffds, link: Some(link), prepared_as: Some(asked) };
    Ok(Done { guest: Some(guest), ..Done::default() })
}

/// The `memory` of this VMM's `hello` holds for every region.
fn check_memory_of(own: &MemoryOf, regions: &[RegionSpec]) -> Result<(), Failure> {
    for (index, region) in regions.iter().enumerate() {
        if let Some(page_size) = own.page_size.filter(|own| *own != region.page_size) {
            let message = format!("{}, this VMM's pages are of {page_size} (--page-size)", region.page_size);
            return Err(Failure::new("UNSUPPORTED", &format!("regions[{index}].page_size"), message));
        }
        if let Some(backing) = own.backing.filter(|own| *own != region.backing) {
            let message = format!("{:?}, this VMM's memory is {backing:?} (--backing)", region.backing).to_lowercase();
            return Err(Failure::new("UNSUPPORTED", &format!("regions[{index}].backing"), message));
        }
    }
    Ok(())
}

fn feature_bits(names: &[String]) -> Result<u64, Failure> {
    names.iter().enumerate().try_fold(0, |bits, (index, name)| match userfaultfd::feature_bit(name) {
        Some(bit) => Ok(bits | bit),
        None => {
            let message = format!("{name:?} is not a userfaultfd feature that this VMM knows");
            Err(Failure::new("UNSUPPORTED", &format!("uffd_features[{index}]"), message))
        }
    })
}
