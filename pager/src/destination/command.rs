//! What the page path of a destination can be asked for, and the way to its thread.

use std::io;
use std::net::TcpStream;
use std::sync::{Arc, mpsc};

use tokio::sync::oneshot;
use tonic::Status;

use crate::destination::lanes::bulk_lane::LaneReport;
use crate::destination::memory::preallocate::PreallocateTarget;
use crate::destination::memory::receive_mapping::ReceiveMapping;
use crate::lane::connect::{SourceAddress, SourceConnection};
use crate::proto::{LinkState, MarkPoisonedReply, MemoryError, PageProgress};
use crate::sys::doorbell::Doorbell;
use crate::vmm::attached_memory::AttachedMemory;
use crate::vmm::notifier::VmmNotifier;

/// What the page path can be asked for. Each is answered once, unless it says otherwise.
#[derive(Debug)]
pub enum Command {
    /// Take the VMM's memory; the VMM is told `attached` if there is a teller. `Err`: why not.
    Attach(AttachedMemory, Option<VmmNotifier>, oneshot::Sender<Result<(), String>>),
    /// The VMM's memory connection is closed. No answer.
    HangUp,
    /// Whether an urgent lane to this source can be taken; false: it is there, or none is needed.
    MayConnect(SourceAddress, oneshot::Sender<Result<bool, Status>>),
    /// The urgent lane is connected.
    Connected(SourceConnection, TcpStream, oneshot::Sender<()>),
    /// A bulk lane of an attempt is connected, or not. No answer.
    BulkOpened(u64, Result<TcpStream, Status>),
    /// What a bulk lane of an attempt has to say. No answer.
    BulkReport(u64, LaneReport),
    /// Memory is to be allocated ahead: where that can be done, in the order of the layout. Until
    /// [`Command::Allocated`] all of it is the caller's, and no lane can be connected.
    Allocate(oneshot::Sender<Result<Vec<Option<PreallocateTarget>>, Status>>),
    /// The files are not written to any more; where pages can be received in place, in the order of the layout. No answer.
    Allocated(Vec<Option<ReceiveMapping>>),
    /// Start the push on so many lanes.
    StartPush(usize, oneshot::Sender<Result<(), Status>>),
    /// Unregister what needs no guard.
    Complete(oneshot::Sender<Result<u64, Status>>),
    /// Pages known to be bad.
    MarkPoisoned(Vec<MemoryError>, oneshot::Sender<MarkPoisonedReply>),
    /// Where it stands.
    Snapshot(oneshot::Sender<Snapshot>),
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

/// The way to the page path's thread.
#[derive(Debug, Clone)]
pub struct Commands {
    sender: mpsc::Sender<Command>,
    doorbell: Arc<Doorbell>,
}

impl Commands {
    /// The way, and its end in the thread.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn new() -> io::Result<(Self, mpsc::Receiver<Command>, Arc<Doorbell>)> {
        let (sender, receiver) = mpsc::channel();
        let doorbell = Arc::new(Doorbell::new()?);
        Ok((Self { sender, doorbell: doorbell.clone() }, receiver, doorbell))
    }

    /// Sends a command without waiting.
    pub fn send(&self, command: Command) {
        let _ = self.sender.send(command);
        self.doorbell.ring();
    }
}
