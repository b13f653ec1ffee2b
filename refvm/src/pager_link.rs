//! The connection to the pager: hands over guest memory, then brings memory errors.
//!
//! A destination waits on a doorbell, which the pager rings once the vCPU of an error is awake. A thread that waits on the
//! socket would wake before the vCPU, and delay it.

use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;

use serde_json::{Value, json};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::memory::GuestMemory;
use crate::protocol::frame::{Decoder, MEMORY_LIMIT};
use crate::protocol::message::{FromPager, Poisoned, VERSION};
use crate::userfaultfd::Userfaultfd;

/// A pager that has not accepted the memory by then never will.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(10);

/// Why memory could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The pager refused it.
    #[error("the pager refused {field:?}: {message}")]
    Refused {
        /// Field of the message.
        field: String,
        /// Its text.
        message: String,
    },
    /// The pager said something else.
    #[error("the pager's answer: {0}")]
    Unreadable(String),
    /// The connection failed.
    #[error("memory socket {socket}: {source}")]
    Socket {
        /// Its path.
        socket: String,
        /// What failed.
        source: io::Error,
    },
}

/// Memory that is attached. Dropping it ends the connection.
#[derive(Debug)]
pub struct PagerLink {
    socket: String,
    stream: UnixStream,
    alive: Arc<AtomicBool>,
}

impl PagerLink {
    /// Connects, hands over the memory and waits until it is accepted; memory errors come as [`Poisoned`].
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn attach<E: From<Poisoned> + Send + 'static>(
        socket: &str,
        vm: &str,
        memory: &GuestMemory,
        uffds: &[Arc<Userfaultfd>],
        events: Sender<E>,
    ) -> Result<Self, AttachError> {
        let failed = |source| AttachError::Socket { socket: socket.into(), source };
        let stream = UnixStream::connect(socket).map_err(failed)?;
        let doorbell = (!uffds.is_empty()).then(|| EventFd::new(EFD_NONBLOCK)).transpose().map_err(failed)?;
        let (message, descriptors) = hand_over(vm, memory, uffds, doorbell.as_ref());
        let text = message.to_string();
        let sent = stream.send_with_fds(&[text.as_bytes()], &descriptors);
        let sent = sent.map_err(|error| failed(io::Error::from_raw_os_error(error.errno())))?;
        if sent != text.len() {
            return Err(failed(io::Error::new(io::ErrorKind::WriteZero, "the message was cut")));
        }
        stream.set_read_timeout(Some(ATTACH_TIMEOUT)).map_err(failed)?;
        let decoder = Decoder::new(MEMORY_LIMIT);
        let mut frames = Frames { stream: stream.try_clone().map_err(failed)?, doorbell: None, decoder };
        match frames.next().map_err(|error| error.into_attach(socket))? {
            FromPager::Attached => {}
            FromPager::Refused(field, message) => return Err(AttachError::Refused { field, message }),
            other => return Err(AttachError::Unreadable(format!("{other:?} before attached"))),
        }
        stream.set_read_timeout(None).map_err(failed)?;
        frames.doorbell = doorbell;
        let alive = Arc::new(AtomicBool::new(true));
        let seen = Arc::clone(&alive);
        let reader = std::thread::Builder::new().name("pager-link".into());
        reader.spawn(move || listen(frames, &events, &seen)).map_err(failed)?;
        Ok(Self { socket: socket.into(), stream, alive })
    }

    /// Whether memory is attached there now.
    pub fn is_attached_to(&self, socket: &str) -> bool {
        self.alive.load(Ordering::Acquire) && self.socket == socket
    }
}

impl Drop for PagerLink {
    fn drop(&mut self) {
        // An error means that the pager ended it before.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

fn hand_over(
    vm: &str,
    memory: &GuestMemory,
    uffds: &[Arc<Userfaultfd>],
    doorbell: Option<&EventFd>,
) -> (Value, Vec<RawFd>) {
    let mut descriptors: Vec<RawFd> = uffds.iter().map(|uffd| uffd.as_raw_fd()).collect();
    let mut regions = Vec::new();
    for (number, region) in memory.regions().iter().enumerate() {
        let spec = &region.spec;
        let mut message = json!({"gpa": spec.gpa, "base_host_virt_addr": region.hva, "size": spec.size,
                                 "page_size": spec.page_size, "backing": spec.backing});
        if let Some(file) = &region.file {
            message["fd"] = descriptors.len().into();
            message["offset"] = 0.into();
            descriptors.push(file.as_raw_fd());
        }
        if uffds.len() > 1 {
            message["uffd"] = number.into();
        }
        regions.push(message);
    }
    let role = if uffds.is_empty() { "source" } else { "destination" };
    let mut message =
        json!({"version": VERSION, "vm": vm, "role": role, "pid": std::process::id(), "regions": regions});
    if uffds.len() == 1 {
        message["uffd"] = 0.into();
    }
    if !uffds.is_empty() && memory.is_to_be_collapsed() {
        message["collapse"] = true.into();
    }
    if let Some(doorbell) = doorbell {
        message["doorbell"] = descriptors.len().into();
        descriptors.push(doorbell.as_raw_fd());
    }
    (message, descriptors)
}

fn listen<E: From<Poisoned>>(mut frames: Frames, events: &Sender<E>, alive: &AtomicBool) {
    let reason = loop {
        match frames.next() {
            Ok(FromPager::MemoryError(poisoned)) => {
                if events.send(poisoned.into()).is_err() {
                    break "the VMM ends".to_string();
                }
            }
            Ok(FromPager::Attached) => {}
            Ok(FromPager::Refused(field, message)) => break format!("{field}: {message}"),
            Err(error) => break error.to_string(),
        }
    };
    alive.store(false, Ordering::Release);
    tracing::info!(reason, "pager_link.closed");
}

/// Reads frames of the memory socket.
struct Frames {
    stream: UnixStream,
    /// Rung for frames; none: the socket itself is waited on.
    doorbell: Option<EventFd>,
    decoder: Decoder,
}

#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("closed by the pager")]
    Closed,
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("{0}")]
    Unreadable(String),
}

impl ReadError {
    fn into_attach(self, socket: &str) -> AttachError {
        let failed = |source| AttachError::Socket { socket: socket.into(), source };
        match self {
            Self::Closed => failed(io::Error::new(io::ErrorKind::UnexpectedEof, "closed before it said attached")),
            Self::Io(error) if error.kind() == io::ErrorKind::WouldBlock => {
                failed(io::Error::new(io::ErrorKind::TimedOut, format!("not attached within {ATTACH_TIMEOUT:?}")))
            }
            Self::Io(error) => failed(error),
            Self::Unreadable(text) => AttachError::Unreadable(text),
        }
    }
}

impl Frames {
    fn next(&mut self) -> Result<FromPager, ReadError> {
        let mut buffer = [0; 4096];
        loop {
            if let Some(frame) = self.decoder.next_frame().map_err(|error| ReadError::Unreadable(error.to_string()))? {
                return FromPager::parse(&frame).map_err(|error| ReadError::Unreadable(error.to_string()));
            }
            match self.receive(&mut buffer)? {
                0 => return Err(ReadError::Closed),
                count => self.decoder.push(&buffer[..count]),
            }
        }
    }

    /// Waits for bytes; 0 at the end of the connection.
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(doorbell) = &self.doorbell else { return self.stream.read(buffer) };
        loop {
            let (into, room) = (buffer.as_mut_ptr().cast(), buffer.len());
            // SAFETY: the kernel writes at most as many bytes as said.
            let count = unsafe { libc::recv(self.stream.as_raw_fd(), into, room, libc::MSG_DONTWAIT) };
            let error = match usize::try_from(count) {
                Ok(count) => return Ok(count),
                Err(_) => io::Error::last_os_error(),
            };
            match error.kind() {
                io::ErrorKind::WouldBlock => until_rung(doorbell, &self.stream)?,
                io::ErrorKind::Interrupted => {}
                _ => return Err(error),
            }
        }
    }
}

/// Until the doorbell is rung, or the connection ends: a pager that dies may have sent a frame and not rung.
fn until_rung(doorbell: &EventFd, stream: &UnixStream) -> io::Result<()> {
    let wait = |fd: RawFd, events| libc::pollfd { fd, events, revents: 0 };
    let mut both = [wait(doorbell.as_raw_fd(), libc::POLLIN), wait(stream.as_raw_fd(), libc::POLLRDHUP)];
    // SAFETY: two pollfds.
    if unsafe { libc::poll(both.as_mut_ptr(), 2, -1) } < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) };
    }
    match doorbell.read() {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
