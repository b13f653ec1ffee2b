//! The memory socket. It takes one message with descriptors from a VMM, answers it, and watches for the VMM's end.
//!
//! One VMM is attached at a time. A refused VMM gets the reason, and its descriptors are closed. The attached one is not
//! affected.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};

use crate::destination;
use crate::pager::Pager;
use crate::pager_error::AttachMemoryError;
use crate::sys::doorbell::Doorbell;
use crate::sys::procfs::is_known_as;
use crate::sys::{fd_passing, other_process};
use crate::vmm::attached_memory::{AttachedFile, AttachedMemory, AttachedRegion};
use crate::vmm::handshake::{Expected, Handshake, MAX_DESCRIPTORS, MAX_MESSAGE_BYTES, Refusal, complete, validate};
use crate::vmm::notifier::VmmNotifier;

/// For the whole message. A VMM sends it at once, so a VMM that takes this long hangs.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// Binds a unix socket that only this user may use. Replaces a stale one of that name.
///
/// # Errors
/// `AddrInUse` if a process still listens there; otherwise the kernel's error.
pub fn bind_private(path: &Path) -> io::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, format!("{} is served already", path.display())));
    }
    // Made under another name and renamed, so that nobody can connect before the mode is set.
    let beside = path.with_extension("new");
    for old in [&beside, path] {
        match std::fs::remove_file(old) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    let listener = UnixListener::bind(&beside)?;
    std::fs::set_permissions(&beside, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&beside, path)?;
    Ok(listener)
}

/// Serves VMMs until the listener fails.
///
/// # Errors
/// accept(2).
pub async fn serve(listener: UnixListener, pager: Arc<Pager>) -> io::Result<()> {
    serve_within(listener, pager, MESSAGE_TIMEOUT).await
}

/// As [`serve`], with another limit for the whole message of each VMM.
///
/// # Errors
/// accept(2).
pub async fn serve_within(listener: UnixListener, pager: Arc<Pager>, message_within: Duration) -> io::Result<()> {
    // One VMM attaches at a time. The next waits for the lock, at most as long as an attach takes.
    let turn = Arc::new(tokio::sync::Mutex::new(()));
    loop {
        let (stream, _) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::MFILE.raw_os_error()) => {
                tracing::error!(%error, "pager.accept_failed");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
            Err(error) => return Err(error),
        };
        let (pager, turn) = (pager.clone(), turn.clone());
        tokio::spawn(async move {
            let attached = {
                let received = tokio::time::timeout(message_within, receive(&stream)).await;
                let _turn = turn.lock().await;
                attach(&stream, received.unwrap_or_else(|_| Err(late(message_within))), &pager).await
            };
            match attached {
                Ok(process) => {
                    let vmm = pager.vmm_process();
                    pager.detached(end_of(stream, process).await).await;
                    pager.end_after(vmm).await;
                }
                Err(refusal) => {
                    pager.refused(refusal.to_string());
                    if let Ok(notifier) = notifier(&stream, None) {
                        let _ = notifier.refused(&refusal.field, &refusal.message);
                    }
                }
            }
        });
    }
}

fn late(message_within: Duration) -> Refusal {
    Refusal::new("message", format!("is not complete after {} s", message_within.as_secs_f64()))
}

struct Message {
    value: serde_json::Value,
    descriptors: Vec<OwnedFd>,
}

async fn receive(stream: &UnixStream) -> Result<Message, Refusal> {
    let mut bytes = Vec::new();
    let mut all = Vec::new();
    let mut buffer = vec![0; MAX_MESSAGE_BYTES + 1];
    loop {
        let received = stream.async_io(Interest::READABLE, || fd_passing::receive(stream, &mut buffer)).await;
        let received = received.map_err(|e| Refusal::new("message", format!("cannot be read: {e}")))?;
        all.extend(received.descriptors);
        bytes.extend_from_slice(&buffer[..received.bytes]);
        if received.truncated {
            return Err(Refusal::new("descriptors", "were lost: the pager has no free descriptors (RLIMIT_NOFILE)"));
        }
        if all.len() > MAX_DESCRIPTORS {
            let message = format!("{} are more than {MAX_DESCRIPTORS}", all.len());
            return Err(Refusal::new("descriptors", message));
        }
        if bytes.len() > MAX_MESSAGE_BYTES {
            return Err(Refusal::new("message", format!("is longer than {MAX_MESSAGE_BYTES} bytes")));
        }
        if let Some(value) = complete(&bytes)? {
            return Ok(Message { value, descriptors: all });
        }
        if received.bytes == 0 {
            return Err(Refusal::new("message", format!("ends after {} bytes, before it is complete", bytes.len())));
        }
    }
}

/// Waits for the end of the memory; returns the reason. A process that the message names may end long after the connection.
async fn end_of(stream: UnixStream, process: Option<OwnedFd>) -> String {
    let ended = match process {
        None => hung_up(stream).await.map(|()| "the VMM closed its memory connection"),
        Some(process) => {
            drop(stream);
            other_process::ended(process).await.map(|()| "the VMM's process ended")
        }
    };
    ended.map_or_else(|error| format!("the VMM's memory connection: {error}"), str::to_owned)
}

/// Hands the memory to the pager. Returns the pidfd of the process that holds it, if the message names one.
async fn attach(
    stream: &UnixStream,
    message: Result<Message, Refusal>,
    pager: &Pager,
) -> Result<Option<OwnedFd>, Refusal> {
    let message = message?;
    let Some(expected) = pager.expected().await else {
        return Err(Refusal::new("message", "comes too early: the daemon has not told the pager what to expect"));
    };
    if pager.is_attached() {
        return Err(Refusal::new("message", "another VMM is attached already"));
    }
    let handshake = validate(&message.value, message.descriptors.len(), &expected)?;
    let peer = stream.peer_cred().ok().and_then(|credentials| credentials.pid());
    let peer = peer.and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0);
    let doorbell = handshake.doorbell.map(|index| {
        let fd = take(&message.descriptors, "doorbell", index)?;
        Doorbell::adopt(fd).map_err(|error| Refusal::new("doorbell", error.to_string()))
    });
    let doorbell = doorbell.transpose()?;
    let process = handshake.process.map(|index| take(&message.descriptors, "process", index)).transpose()?;
    let notifier = match handshake.silent {
        true => None,
        false => {
            let made = notifier(stream, doorbell);
            let made = made.map_err(|e| Refusal::new("message", format!("cannot be answered: {e}")))?;
            Some(if process.is_some() { made.with_machine_checks_of_the_kernel() } else { made })
        }
    };
    let memory = gather(handshake, &message.descriptors, &expected, peer)?;
    pager.attach(memory, notifier).await.map_err(|error| Refusal::new(field_of(&error), error.to_string()))?;
    Ok(process)
}

/// The field of the VMM's message that an error is about; `message` stands for the whole.
fn field_of(error: &AttachMemoryError) -> &'static str {
    use destination::error::AttachError as Destination;
    match error {
        AttachMemoryError::Destination(Destination::Userfaultfd(_) | Destination::RegionWithoutUserfaultfd) => "uffd",
        AttachMemoryError::Destination(Destination::RegionCount | Destination::MinorFaults(_)) => "regions",
        AttachMemoryError::Destination(Destination::ForeignTable { .. } | Destination::Unanswered(_))
        | AttachMemoryError::Unexpected
        | AttachMemoryError::Source(_)
        | AttachMemoryError::Unanswered(_)
        | AttachMemoryError::Ended(_) => "message",
    }
}

/// A copy of the descriptor that a field names.
fn take(descriptors: &[OwnedFd], field: &str, index: usize) -> Result<OwnedFd, Refusal> {
    let fd = descriptors.get(index).ok_or_else(|| Refusal::new(field, "names a missing descriptor"))?;
    fd.try_clone().map_err(|e| Refusal::new(field, format!("cannot be kept: {e}")))
}

/// Finds the memory of each region among the descriptors. One descriptor may hold several regions.
fn gather(
    handshake: Handshake,
    descriptors: &[OwnedFd],
    expected: &Expected,
    peer: u32,
) -> Result<AttachedMemory, Refusal> {
    let mut indices: Vec<usize> = handshake.regions.iter().filter_map(|place| place.uffd).collect();
    indices.sort_unstable();
    indices.dedup();
    let uffds = indices.iter().map(|index| take(descriptors, "uffd", *index)).collect::<Result<_, _>>()?;
    let mut regions = Vec::new();
    for ((place, region), number) in handshake.regions.iter().zip(expected.layout.regions()).zip(0..) {
        let mut file = None;
        if let Some((index, offset)) = place.file {
            let field = format!("regions[{number}].fd");
            let fd = take(descriptors, &field, index)?;
            let size = size_of(&fd).map_err(|e| Refusal::new(field.as_str(), e.to_string()))?;
            if offset.checked_add(region.size).is_none_or(|end| end > size) {
                let message = format!("has {size:#x} bytes: too short for {:#x} from {offset:#x}", region.size);
                return Err(Refusal::new(field, message));
            }
            file = Some(AttachedFile { fd, offset });
        }
        let uffd = place.uffd.and_then(|index| indices.binary_search(&index).ok());
        regions.push(AttachedRegion { hva: place.hva, file, uffd });
    }
    // A VMM in a pid namespace of its own names itself by another number.
    let vmm_pid = handshake.pid.filter(|pid| !is_known_as(peer, *pid)).unwrap_or(peer);
    Ok(AttachedMemory { vmm_pid, layout: expected.layout.clone(), regions, uffds, collapse: handshake.collapse })
}

fn size_of(fd: &OwnedFd) -> io::Result<u64> {
    let metadata = File::from(fd.try_clone()?).metadata()?;
    match metadata.is_file() {
        true => Ok(metadata.len()),
        false => Err(io::Error::other("is not a regular file")),
    }
}

fn notifier(stream: &UnixStream, doorbell: Option<Doorbell>) -> io::Result<VmmNotifier> {
    let own = stream.as_fd().try_clone_to_owned()?;
    Ok(VmmNotifier::new(own.into(), doorbell))
}

/// Reads and drops all that still comes, until the end of the connection. It wakes for nothing else. Each frame that the VMM
/// reads makes room to write, but a wake-up for it would take the core from a vCPU.
async fn hung_up(stream: UnixStream) -> io::Result<()> {
    let stream = fd_passing::watch_readable(stream.into_std()?)?;
    let mut buffer = [0; 4096];
    while stream.async_io(Interest::READABLE, |stream| fd_passing::receive(stream, &mut buffer)).await?.bytes > 0 {}
    Ok(())
}

#[cfg(test)]
mod tests;
