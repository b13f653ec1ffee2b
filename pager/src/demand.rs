//! The urgent lane: a bidirectional stream on a connection of its own.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use crate::proto::pages_client::PagesClient;
use crate::proto::{PageRange, PageReply, PageRequest};
use crate::serve::{PROTOCOL_VERSION, TOKEN_KEY};

/// Largest reply that is accepted, in bytes: a run of 1 GiB would be refused, 2 MiB pages fit many times.
const LARGEST_REPLY: usize = 64 << 20;
const WINDOW: u32 = 16 << 20;
/// A source that says nothing on the new stream for so long accepted it: gRPC servers may withhold their headers
/// until the first reply.
const HEADERS_WITHIN: Duration = Duration::from_millis(200);

/// What comes from a lane.
#[derive(Debug)]
pub enum LaneMessage {
    /// The source accepted the stream.
    Opened,
    /// Pages.
    Reply(PageReply),
    /// The stream is over; nothing comes after. `Ok`: the source ended it.
    Ended(Result<(), Status>),
}

/// Where the source's pager is, and how it knows us.
#[derive(Debug, Clone, PartialEq)]
pub struct Source {
    /// "ip:port".
    pub address: String,
    /// One-time token.
    pub token: String,
    /// Of a connect, and of a demanded page.
    pub timeout: Duration,
}

impl Source {
    /// Connects one lane.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for an address that is none, `UNAVAILABLE` if nobody answers there.
    pub async fn connect(&self) -> Result<PagesClient<Channel>, Status> {
        let invalid =
            |e: tonic::transport::Error| Status::invalid_argument(format!("lane_address {}: {e}", self.address));
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address))
            .map_err(invalid)?
            .tcp_nodelay(true)
            .connect_timeout(self.timeout)
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW);
        let unavailable = |e: tonic::transport::Error| {
            let cause = std::error::Error::source(&e).map_or_else(|| e.to_string(), ToString::to_string);
            Status::unavailable(format!("source {}: {cause}", self.address))
        };
        let channel = match tokio::time::timeout(self.timeout, endpoint.connect()).await {
            Ok(connected) => connected.map_err(unavailable)?,
            Err(_) => {
                return Err(Status::unavailable(format!(
                    "source {}: no connection in {:?}",
                    self.address, self.timeout
                )));
            }
        };
        Ok(PagesClient::new(channel).max_decoding_message_size(LARGEST_REPLY))
    }

    /// A request with the token.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for a token that cannot be sent.
    pub fn request<T>(&self, body: T) -> Result<Request<T>, Status> {
        let mut request = Request::new(body);
        let token: MetadataValue<Ascii> =
            self.token.parse().map_err(|_| Status::invalid_argument("token: not printable ASCII"))?;
        request.metadata_mut().insert(TOKEN_KEY, token);
        Ok(request)
    }
}

/// An open urgent lane. Dropping it closes the stream.
#[derive(Debug)]
pub struct DemandLane {
    requests: mpsc::UnboundedSender<PageRequest>,
    /// Replies, then the end.
    pub replies: mpsc::UnboundedReceiver<LaneMessage>,
}

impl DemandLane {
    /// Connects and opens the stream.
    ///
    /// # Errors
    /// The status of the connect, or that with which the source refused the lane.
    pub async fn open(source: &Source) -> Result<Self, Status> {
        let mut client = source.connect().await?;
        let (requests, outgoing) = mpsc::unbounded_channel();
        let request = source.request(UnboundedReceiverStream::new(outgoing))?;
        let (sender, mut replies) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            match client.demand(request).await {
                Ok(response) => {
                    let _ = sender.send(LaneMessage::Opened);
                    let mut stream = response.into_inner();
                    let end = loop {
                        match stream.message().await {
                            Ok(Some(reply)) => {
                                if sender.send(LaneMessage::Reply(reply)).is_err() {
                                    return;
                                }
                            }
                            Ok(None) => break Ok(()),
                            Err(status) => break Err(status),
                        }
                    };
                    let _ = sender.send(LaneMessage::Ended(end));
                }
                Err(status) => {
                    let _ = sender.send(LaneMessage::Ended(Err(status)));
                }
            }
        });
        if let Ok(Some(LaneMessage::Ended(end))) = tokio::time::timeout(HEADERS_WITHIN, replies.recv()).await {
            return Err(end
                .err()
                .unwrap_or_else(|| Status::new(Code::Unavailable, "the source ended the lane at once")));
        }
        Ok(Self { requests, replies })
    }

    /// Asks for a run of pages. False: the lane is over (its end is among the replies).
    pub fn ask(&self, range: PageRange) -> bool {
        self.requests.send(PageRequest { protocol_version: PROTOCOL_VERSION, range: Some(range) }).is_ok()
    }
}
