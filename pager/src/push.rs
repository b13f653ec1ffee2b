//! The bulk lanes: server streams, each on a connection and a thread of its own. The destination names what it lacks.

use tokio::sync::mpsc;
use tonic::Status;

use crate::demand::{LaneMessage, Source};
use crate::proto::{PageRange, PushRequest};
use crate::serve::PROTOCOL_VERSION;

/// Replies that wait for the page path; more would only hide that it does not keep up.
const REPLIES_WAITING: usize = 4;

/// The open bulk lanes; dropping them closes their streams.
#[derive(Debug)]
pub struct PushLanes {
    /// What comes from any of them.
    pub replies: mpsc::Receiver<LaneMessage>,
    /// Lanes that have not ended.
    pub open: usize,
}

impl PushLanes {
    /// Opens a lane for each share; an error of a lane comes as its end.
    pub fn open(source: &Source, shares: Vec<Vec<PageRange>>) -> Self {
        let (sender, replies) = mpsc::channel(REPLIES_WAITING);
        let open = shares.len();
        for (lane, lacking) in shares.into_iter().enumerate() {
            let (source, sender, ended) = (source.clone(), sender.clone(), sender.clone());
            let run = move || run_lane(&source, lacking, &sender);
            if let Err(error) = std::thread::Builder::new().name(format!("push-{lane}")).spawn(run) {
                let status = Status::resource_exhausted(format!("no thread for a bulk lane: {error}"));
                tokio::spawn(async move { ended.send(LaneMessage::Ended(Err(status))).await });
            }
        }
        Self { replies, open }
    }
}

/// The life of one lane's thread: what HTTP/2 costs is paid here, so that the page path only installs.
fn run_lane(source: &Source, lacking: Vec<PageRange>, sender: &mpsc::Sender<LaneMessage>) {
    let lane = async {
        let end = tokio::select! {
            end = receive(source, lacking, sender) => end,
            () = sender.closed() => return,
        };
        let _ = sender.send(LaneMessage::Ended(end)).await;
    };
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(lane),
        Err(error) => {
            let status = Status::resource_exhausted(format!("no runtime for a bulk lane: {error}"));
            let _ = sender.blocking_send(LaneMessage::Ended(Err(status)));
        }
    }
}

async fn receive(source: &Source, lacking: Vec<PageRange>, to: &mpsc::Sender<LaneMessage>) -> Result<(), Status> {
    let mut client = source.connect().await?;
    let request = source.request(PushRequest { protocol_version: PROTOCOL_VERSION, lacking })?;
    let mut stream = client.push(request).await?.into_inner();
    while let Some(reply) = stream.message().await? {
        if to.send(LaneMessage::Reply(reply)).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// Splits what is lacking into so many shares of about the same number of pages, none empty.
pub fn shares(lacking: &[PageRange], lanes: usize) -> Vec<Vec<PageRange>> {
    let total: u64 = lacking.iter().map(|r| r.count).sum();
    let each = total.div_ceil(lanes.max(1) as u64).max(1);
    let mut shares: Vec<Vec<PageRange>> = Vec::new();
    let mut room = 0;
    for range in lacking {
        let (mut page, end) = (range.page, range.page + range.count);
        while page < end {
            if room == 0 {
                shares.push(Vec::new());
                room = each;
            }
            let count = room.min(end - page);
            if let Some(share) = shares.last_mut() {
                share.push(PageRange { region: range.region, page, count });
            }
            page += count;
            room -= count;
        }
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_hold_every_page_once() {
        let range = |region, page, count| PageRange { region, page, count };
        assert!(shares(&[], 3).is_empty());
        assert_eq!(shares(&[range(0, 5, 1)], 4), vec![vec![range(0, 5, 1)]]);
        let split = shares(&[range(0, 0, 5), range(1, 2, 4)], 2);
        assert_eq!(split, vec![vec![range(0, 0, 5)], vec![range(1, 2, 4)]]);
        let split = shares(&[range(0, 0, 10)], 3);
        assert_eq!(split, vec![vec![range(0, 0, 4)], vec![range(0, 4, 4)], vec![range(0, 8, 2)]]);
    }
}
