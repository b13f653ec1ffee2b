//! A bulk lane of a source: sends what the destination lacks, at the rate that is allowed.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::sender::{Broken, Outlet};
use crate::lane::PAGE;
use crate::sched::priority;
use crate::source::SourceServer;
use crate::source::push_order::PushOrder;

/// A lane that waits for its rate looks so often whether the rate has changed or the source may no longer serve.
const LOOK: Duration = Duration::from_millis(20);

/// Until all is sent.
pub(super) fn run(server: &SourceServer, stream: TcpStream, mut order: PushOrder) -> Result<(), Broken> {
    priority::bulk();
    let mut outlet = Outlet::new(stream);
    let outcome = loop {
        let Some(chunk) = order.next_chunk(server.latest_demand()) else { break outlet.end().map_err(Broken::from) };
        let bytes = chunk.iter().map(|run| run.count * PAGE).sum();
        wait(server, bytes);
        if let Err(error) = chunk.into_iter().try_for_each(|run| outlet.send(&server.0, run)) {
            break Err(error);
        }
        priority::give_way();
    };
    if let Err(Broken::Source(reason)) = &outcome {
        outlet.failed(&reason.to_string())?;
    }
    outcome
}

fn wait(server: &SourceServer, bytes: u64) {
    let until = Instant::now() + server.pace(bytes);
    let limit = server.push_limit();
    while let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        std::thread::sleep(left.min(LOOK));
        if !server.is_frozen() || server.push_limit() != limit {
            return;
        }
    }
}
