//! Writes frames to the connection of a lane.

use std::io::{self, Write};
use std::net::TcpStream;
use std::time::Instant;

use super::queue_limit::{Look, QueueLimit};
use crate::lane::frame::{FrameHeader, FrameKind, MAX_REASON_BYTES};
use crate::sys::iovecs::{self, SendBytes};
use crate::sys::tcp::{self, TcpInfo};

/// Fewest bytes of one call, on a lane with a pace.
const MIN_PIECE: u64 = 16 << 10;
/// Most calls a second that a pace asks for.
const PIECES_A_SECOND: u64 = 100;

/// The sending half of a connection.
#[derive(Debug)]
pub(super) struct FrameWriter {
    stream: TcpStream,
    bytes_sent: u64,
    /// Only of a lane that yields to others.
    queue_limit: Option<QueueLimit>,
}

impl FrameWriter {
    /// Takes a connected lane; `keeps_queue_short`: the lane yields to others in the network.
    pub fn new(stream: TcpStream, keeps_queue_short: bool) -> Self {
        let queue_limit = keeps_queue_short.then(|| QueueLimit::new(Instant::now()));
        Self { stream, bytes_sent: 0, queue_limit }
    }

    /// Bytes that the connection took, headers included.
    pub fn bytes_sent(&self) -> u64 {
        self.bytes_sent
    }

    /// Sends a frame without contents.
    pub fn write_header(&mut self, header: &FrameHeader) -> io::Result<()> {
        let header = header.encode();
        self.stream.write_all(&header)?;
        self.bytes_sent += header.len() as u64;
        Ok(())
    }

    /// Sends a frame, by one call if the socket has room. If the contents go bad before they are sent (`EFAULT`), the frame is
    /// never whole, so the destination installs nothing of it.
    pub fn write(&mut self, header: &FrameHeader, contents: SendBytes<'_>) -> io::Result<()> {
        let header = header.encode();
        let header = SendBytes::of(&header);
        let (all, mut sent) = (header.count() + contents.count(), 0);
        while sent < all {
            let most = self.keep_queue_short();
            let of_contents = sent.saturating_sub(header.count());
            match iovecs::send(&self.stream, [header.part(sent, most), contents.part(of_contents, most)]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(bytes) => {
                    sent += bytes;
                    self.bytes_sent += bytes as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Tells the destination why the lane ends.
    pub fn write_reason(&mut self, reason: &str) -> io::Result<()> {
        let text = &reason.as_bytes()[..reason.len().min(MAX_REASON_BYTES as usize)];
        let header = FrameHeader { kind: FrameKind::Failed, region: 0, page: 0, count: text.len() as u32 };
        self.write(&header, SendBytes::of(text))
    }

    /// Measures the queue in the network when that is due, and sets the pace. Returns the most bytes for the next call.
    fn keep_queue_short(&mut self) -> usize {
        let Some(limit) = &mut self.queue_limit else { return usize::MAX };
        let now = Instant::now();
        if limit.is_due(now)
            && let Ok(Some(info)) = TcpInfo::of(&self.stream)
            && let Some(pace) = limit.look(now, Look::from(info))
        {
            tracing::debug!(?pace, ?info, "lane.paced");
            // A failure leaves a longer queue, and nothing worse.
            let _ = tcp::set_max_pacing_rate(&self.stream, pace);
        }
        limit.pace().map_or(usize::MAX, |pace| (pace / PIECES_A_SECOND).max(MIN_PIECE) as usize)
    }
}
