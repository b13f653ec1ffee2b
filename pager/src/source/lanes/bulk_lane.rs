//! A bulk lane of a source. It sends every page that the destination lacks, within the rate limit.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::sender::{LaneError, LaneSender};
use crate::layout::PAGE_SIZE;
use crate::sched::priority;
use crate::source::SourceServer;
use crate::source::push_order::PushOrder;

/// Period of a lane's check, during a wait for its rate, for a new rate or a thawed source.
const RATE_POLL: Duration = Duration::from_millis(20);

/// Runs until every page is sent.
pub(super) fn run(server: &SourceServer, stream: TcpStream, mut order: PushOrder) -> Result<(), LaneError> {
    priority::batch();
    let mut sender = LaneSender::bulk(stream);
    let outcome = loop {
        let Some(chunk) = order.next_chunk(server.latest_demand()) else { break sender.end().map_err(LaneError::from) };
        let bytes: u64 = chunk.iter().map(|run| run.count * PAGE_SIZE).sum();
        wait(server, bytes);
        let before = sender.bytes_sent();
        if let Err(error) = chunk.into_iter().try_for_each(|run| sender.send(&server.0, run)) {
            break Err(error);
        }
        server.give_back(bytes.saturating_sub(sender.bytes_sent() - before));
        priority::yield_cpu();
    };
    if let Err(LaneError::Source(reason)) = &outcome {
        sender.failed(&reason.to_string())?;
    }
    outcome
}

fn wait(server: &SourceServer, bytes: u64) {
    let until = Instant::now() + server.pace(bytes);
    let limit = server.push_limit();
    while let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        std::thread::sleep(left.min(RATE_POLL));
        if !server.is_frozen() || server.push_limit() != limit {
            return;
        }
    }
}
