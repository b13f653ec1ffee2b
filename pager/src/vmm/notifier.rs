//! Frames from the pager to the VMM on its memory socket: 4 bytes of length, big-endian, then JSON.
//!
//! A VMM that waits on its doorbell, not on the socket, has a memory error in the socket before the vCPU is woken, as any VMM
//! has, but is itself woken behind the vCPU: to wake a sleeping thread takes longer than all else that a poisoned page needs.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::proto::{MemoryErrorEvent, Severity};
use crate::sys::doorbell::Doorbell;
use crate::sys::poll::wait_writable;

/// A VMM that does not read for so long is taken as not told. A vCPU waits meanwhile.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);

/// Of a frame's length, before it.
const LENGTH_BYTES: usize = 4;

/// What a frame says.
#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum VmmFrame<'a> {
    Attached { version: u32 },
    Error { field: &'a str, message: &'a str },
    MemoryError { gpa: u64, hva: u64, lsb: u32, severity: &'a str, thread: u32, origin: &'a str, hop: u32 },
}

/// The sending half.
#[derive(Debug)]
pub struct VmmNotifier {
    socket: UnixStream,
    doorbell: Option<Doorbell>,
    kernel: bool,
}

impl VmmNotifier {
    /// The socket must be non-blocking.
    pub fn new(socket: UnixStream, doorbell: Option<Doorbell>) -> Self {
        Self { socket, doorbell, kernel: false }
    }

    /// Of a VMM that knows the kernel's SIGBUS alone: after `attached` it is sent no frame.
    pub fn with_machine_checks_of_the_kernel(self) -> Self {
        Self { kernel: true, ..self }
    }

    /// Whether the VMM learns of a page: by a frame, or by SIGBUS where one of its threads waits on the page.
    pub fn reaches_vmm(&self, waits: bool) -> bool {
        waits || !self.kernel
    }

    /// The memory is accepted.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn attached(&self) -> io::Result<()> {
        self.frame(&VmmFrame::Attached { version: 1 })
    }

    /// The memory is refused.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn refused(&self, field: &str, message: &str) -> io::Result<()> {
        self.frame(&VmmFrame::Error { field, message })
    }

    /// A page is poison.
    ///
    /// # Errors
    /// What the kernel said; the VMM may not know of it.
    pub fn memory_error(&self, event: &MemoryErrorEvent) -> io::Result<()> {
        if self.kernel {
            return Ok(());
        }
        let error = event.error.unwrap_or_default();
        let severity = if error.severity() == Severity::ActionRequired { "AR" } else { "AO" };
        let origin = error.origin().as_str_name().trim_start_matches("ERROR_ORIGIN_").to_ascii_lowercase();
        self.frame(&VmmFrame::MemoryError {
            gpa: error.gpa,
            hva: event.hva,
            lsb: error.lsb,
            severity,
            thread: event.thread_id,
            origin: &origin,
            hop: error.hop,
        })
    }

    /// Memory errors were sent, and their vCPUs woken.
    pub fn notify(&self) {
        self.doorbell.iter().for_each(Doorbell::ring);
    }

    /// Writes a whole frame or breaks the connection: half a frame would make nonsense of the next.
    fn frame(&self, body: &VmmFrame<'_>) -> io::Result<()> {
        let mut bytes = vec![0; LENGTH_BYTES];
        serde_json::to_writer(&mut bytes, body)?;
        let length = u32::try_from(bytes.len() - LENGTH_BYTES).map_err(io::Error::other)?;
        bytes[..LENGTH_BYTES].copy_from_slice(&length.to_be_bytes());
        let deadline = Instant::now() + SEND_TIMEOUT;
        let mut sent = 0;
        while sent < bytes.len() {
            match (&self.socket).write(&bytes[sent..]) {
                Ok(count) => sent += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && self.writable_before(deadline) => {}
                Err(error) => {
                    let _ = self.socket.shutdown(std::net::Shutdown::Both);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn writable_before(&self, deadline: Instant) -> bool {
        wait_writable(&self.socket, deadline.saturating_duration_since(Instant::now()))
    }
}
