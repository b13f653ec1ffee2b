//! Frames from the pager to the VMM on its memory socket: 4 bytes of length, big-endian, then JSON.

use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::proto::{MemoryErrorEvent, Severity};

/// A VMM that does not read for so long is taken as not told. A vCPU waits meanwhile.
const PATIENCE: Duration = Duration::from_secs(1);

/// The sending half.
#[derive(Debug)]
pub struct Teller {
    socket: UnixStream,
}

impl Teller {
    /// The socket must be non-blocking.
    pub fn new(socket: UnixStream) -> Self {
        Self { socket }
    }

    /// The memory is accepted.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn attached(&self) -> io::Result<()> {
        self.frame(&json!({"type": "attached", "version": 1}))
    }

    /// The memory is refused.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn refused(&self, field: &str, message: &str) -> io::Result<()> {
        self.frame(&json!({"type": "error", "field": field, "message": message}))
    }

    /// A page is poison.
    ///
    /// # Errors
    /// What the kernel said; the VMM may not know of it.
    pub fn memory_error(&self, event: &MemoryErrorEvent) -> io::Result<()> {
        let error = event.error.unwrap_or_default();
        let severity = if error.severity() == Severity::ActionRequired { "AR" } else { "AO" };
        let origin = error.origin().as_str_name().trim_start_matches("ERROR_ORIGIN_").to_ascii_lowercase();
        self.frame(&json!({
            "type": "memory_error", "gpa": error.gpa, "hva": event.hva, "lsb": error.lsb, "severity": severity,
            "thread": event.thread_id, "origin": origin, "hop": error.hop,
        }))
    }

    /// Writes a whole frame or breaks the connection: half a frame would make nonsense of the next.
    fn frame(&self, body: &serde_json::Value) -> io::Result<()> {
        let body = body.to_string();
        let length = u32::try_from(body.len()).map_err(io::Error::other)?;
        let bytes = [&length.to_be_bytes(), body.as_bytes()].concat();
        let deadline = Instant::now() + PATIENCE;
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
        let left = deadline.saturating_duration_since(Instant::now()).as_millis();
        let mut poll = libc::pollfd { fd: self.socket.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
        // SAFETY: one pollfd.
        unsafe { libc::poll(&mut poll, 1, i32::try_from(left).unwrap_or(0)) == 1 }
    }
}
