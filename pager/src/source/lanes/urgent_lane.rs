//! The urgent lane of a source. It reads requests and answers each at once.

use std::io::{self, Read};
use std::net::TcpStream;
use std::time::Instant;

use super::sender::{LaneError, LaneSender};
use crate::lane::frame::{ASK_BYTES, Ask};
use crate::layout::page_run::PageRun;
use crate::sched::cpu_latency::CpuLatencyRequest;
use crate::sched::incoming_cpu::FollowIncomingCpu;
use crate::sched::priority;
use crate::source::SourceServer;
use crate::sys::tcp::set_interactive;

/// Runs until the destination closes the lane.
pub(super) fn run(server: &SourceServer, stream: TcpStream) -> Result<(), LaneError> {
    priority::favoured();
    if let Err(error) = set_interactive(&stream) {
        tracing::debug!(%error, "lane.option_unknown");
    }
    let mut sender = LaneSender::urgent(stream.try_clone()?);
    let (cpu_latency, mut follow) =
        (CpuLatencyRequest::new(server.0.tuning.keep_awake), FollowIncomingCpu::new(Instant::now()));
    let mut asks = Asks { stream, bytes: [0; ROOM], have: 0 };
    let outcome = loop {
        match asks.next()? {
            None => return Ok(()),
            Some(ask) => {
                cpu_latency.renew();
                if let Err(error) = answer(server, &mut sender, ask) {
                    break error;
                }
                follow.step(&asks.stream);
            }
        }
    };
    if let LaneError::Source(reason) = &outcome {
        sender.failed(&reason.to_string())?;
    }
    Err(outcome)
}

fn answer(server: &SourceServer, sender: &mut LaneSender, ask: Ask) -> Result<(), LaneError> {
    let asked = server.checked(PageRun { region: ask.region, page: ask.page, count: ask.count.into() })?;
    server.note_demand(asked);
    server.await_frozen();
    sender.send(&server.0, asked)
}

/// Bytes of the requests that one read takes, at most.
const ROOM: usize = 64 * ASK_BYTES;

struct Asks {
    stream: TcpStream,
    bytes: [u8; ROOM],
    have: usize,
}

impl Asks {
    /// The next ask; `None` at the end of the connection.
    fn next(&mut self) -> io::Result<Option<Ask>> {
        loop {
            if let Some((first, _)) = self.bytes[..self.have].split_first_chunk::<ASK_BYTES>() {
                let ask = Ask::decode(first);
                self.bytes.copy_within(ASK_BYTES..self.have, 0);
                self.have -= ASK_BYTES;
                return Ok(Some(ask));
            }
            match self.stream.read(&mut self.bytes[self.have..]) {
                Ok(0) => return Ok(None),
                Ok(n) => self.have += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}
