//! Proves that ranges are empty, or empties them and proves it then.

use crate::error::Error;
use crate::identity::Process;
use crate::inject::Injector;
use crate::memory::presence::Presence;
use crate::proto::{EmptyReply, EmptyRequest};

pub(super) fn empty(process: &Process, request: &EmptyRequest, injector: &mut Injector) -> Result<EmptyReply, Error> {
    let presence = Presence::of(process)?;
    let mut discarded = Vec::new();
    for range in &request.ranges {
        if request.discard && presence.first_page(range)?.is_some() {
            presence.discard(range, injector)?;
            discarded.push(*range);
        }
    }
    presence.check_empty(&request.ranges)?;
    Ok(EmptyReply { discarded })
}
