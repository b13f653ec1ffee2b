//! Commands to the fault thread, and the way there.

use std::io;
use std::net::TcpStream;
use std::sync::{Arc, mpsc};

use tokio::sync::oneshot;

use crate::destination::error::{AttachError, CompleteError, LinkError};
use crate::destination::lanes::bulk_lanes::BulkEvent;
use crate::destination::link::Redialled;
use crate::destination::memory::preallocate::{PreallocateError, PreallocateTarget};
use crate::destination::memory::receive_mapping::ReceiveMapping;
use crate::lane::connect::{SourceAddress, SourceConnection};
use crate::proto::{LinkState, MarkPoisonedReply, MemoryError, PageProgress};
use crate::sys::doorbell::Doorbell;
use crate::vmm::attached_memory::AttachedMemory;
use crate::vmm::notifier::VmmNotifier;

/// A command to the fault thread. Each is answered once, unless it says otherwise.
#[derive(Debug)]
pub enum Command {
    /// Take the VMM's memory; the VMM is told `attached` if there is a notifier.
    Attach(AttachedMemory, Option<VmmNotifier>, oneshot::Sender<Result<(), AttachError>>),
    /// The VMM's memory connection is closed. No answer.
    HangUp,
    /// Whether an urgent lane to this source can be taken; false: it is there, or none is needed.
    MayConnect(SourceAddress, oneshot::Sender<Result<bool, LinkError>>),
    /// The urgent lane is connected.
    Connected(SourceConnection, TcpStream, oneshot::Sender<()>),
    /// An event of a bulk lane. No answer.
    Bulk(BulkEvent),
    /// A second connection to a silent source is made, or failed. No answer.
    Redialled(Redialled),
    /// Hand out the memory to be allocated ahead, in the order of the layout. Until [`Command::Allocated`] all of it is the
    /// caller's, and no lane can be connected.
    Allocate(oneshot::Sender<Result<Vec<Option<PreallocateTarget>>, PreallocateError>>),
    /// The caller of [`Command::Allocate`] is done; these mappings can be received into, in the order of the layout. No answer.
    Allocated(Vec<Option<ReceiveMapping>>),
    /// Start the push on this many lanes.
    StartPush(usize, oneshot::Sender<Result<(), LinkError>>),
    /// Unregister every range that needs no guard.
    Complete(oneshot::Sender<Result<u64, CompleteError>>),
    /// Mark the pages of known memory errors as poisoned.
    MarkPoisoned(Vec<MemoryError>, oneshot::Sender<MarkPoisonedReply>),
    /// Forget poisoned pages that the VMM has replaced; answers how many.
    ForgetReplaced(oneshot::Sender<u64>),
    /// Report the state of the link and the pages.
    Snapshot(oneshot::Sender<Snapshot>),
    /// Remove the page table and end the thread.
    End(oneshot::Sender<()>),
}

/// The state of a destination.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    /// State of the link.
    pub link: LinkState,
    /// Why it is down.
    pub link_reason: String,
    /// Counts of pages and faults.
    pub progress: PageProgress,
}

/// The sending half of the way to the fault thread.
#[derive(Debug, Clone)]
pub struct Commands {
    sender: mpsc::Sender<Command>,
    doorbell: Arc<Doorbell>,
}

impl Commands {
    /// Both halves of the way.
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
