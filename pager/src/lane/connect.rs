//! The destination's end of `OpenLane`: agrees on a lane by gRPC, connects it, says hello.

use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpSocket;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use super::frame::LaneToken;
use super::path::{outlive_outages, probe};
use super::{PROTOCOL_VERSION, TOKEN_KEY};
use crate::proto::open_lane_request::Lane;
use crate::proto::pages_client::PagesClient;
use crate::proto::{BulkLane, OpenLaneRequest, PageRange, UrgentLane};
use crate::sys::tcp::set_interactive;
use crate::tuning::Tuning;

/// For some round trips and retransmissions of a few packets each way.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// A lane on which nothing waits counts as broken after so long a silence.
const LEAST_PATIENCE: Duration = Duration::from_secs(60);

/// Where the source's pager is, and how it knows us.
#[derive(Debug, Clone, PartialEq)]
pub struct SourceAddress {
    /// "ip:port".
    pub address: String,
    /// Token of `ServeSource`.
    pub token: String,
    /// How long the urgent lane may be silent while a page is demanded.
    pub demand_timeout: Duration,
    /// Until a lane is open, from the first packet on.
    pub connect_timeout: Duration,
}

/// A source that has been reached; clones share one connection.
#[derive(Debug, Clone)]
pub struct SourceConnection {
    /// Whom.
    pub source: SourceAddress,
    client: PagesClient<Channel>,
    tuning: Arc<Tuning>,
}

impl SourceAddress {
    /// Connects for `OpenLane`; lanes are tuned as `tuning` says.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for an address or token that is none, `UNAVAILABLE` if nobody answers there.
    pub async fn reach(self, tuning: Arc<Tuning>) -> Result<SourceConnection, Status> {
        let invalid =
            |e: tonic::transport::Error| Status::invalid_argument(format!("lane_address {}: {e}", self.address));
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).map_err(invalid)?;
        let endpoint = endpoint.tcp_nodelay(true).connect_timeout(self.connect_timeout);
        let connected = self.in_time(endpoint.connect()).await?;
        let channel = connected.map_err(|e| {
            let cause = std::error::Error::source(&e).map_or_else(|| e.to_string(), ToString::to_string);
            Status::unavailable(format!("source {}: {cause}", self.address))
        })?;
        Ok(SourceConnection {
            source: self,
            client: PagesClient::new(channel).max_encoding_message_size(64 << 20),
            tuning,
        })
    }

    async fn in_time<T>(&self, doing: impl Future<Output = T>) -> Result<T, Status> {
        let late = |_| Status::unavailable(format!("source {}: no answer in {:?}", self.address, self.connect_timeout));
        tokio::time::timeout(self.connect_timeout, doing).await.map_err(late)
    }
}

impl SourceConnection {
    /// Opens the urgent lane.
    ///
    /// # Errors
    /// The status with which the source refused it, or `UNAVAILABLE`.
    pub async fn urgent(self) -> Result<TcpStream, Status> {
        let stream = self.open(Lane::Urgent(UrgentLane {})).await?;
        if let Err(error) = set_interactive(&stream) {
            tracing::debug!(%error, "lane.option_unknown");
        }
        Ok(stream)
    }

    /// Opens a bulk lane for what is lacking, in pages of 4 KiB.
    ///
    /// # Errors
    /// As [`SourceConnection::urgent`].
    pub async fn bulk(self, lacking: Vec<PageRange>) -> Result<TcpStream, Status> {
        self.open(Lane::Bulk(BulkLane { lacking })).await
    }

    async fn open(mut self, lane: Lane) -> Result<TcpStream, Status> {
        let mut request = Request::new(OpenLaneRequest { protocol_version: PROTOCOL_VERSION, lane: Some(lane) });
        let token: MetadataValue<Ascii> =
            self.source.token.parse().map_err(|_| Status::invalid_argument("token: not printable ASCII"))?;
        request.metadata_mut().insert(TOKEN_KEY, token);
        let reply = self.source.in_time(self.client.open_lane(request)).await??.into_inner();
        let token: LaneToken = reply.token[..].try_into().map_err(|_| {
            Status::unavailable(format!("source {}: a lane token of {} bytes", self.source.address, reply.token.len()))
        })?;
        let address = if reply.address.is_empty() { &self.source.address } else { &reply.address };
        let unavailable = |e: std::io::Error| Status::unavailable(format!("lane to {address}: {e}"));
        let mut stream = self.source.in_time(self.connect(address)).await?.map_err(unavailable)?;
        stream.set_nodelay(true).map_err(unavailable)?;
        let within = PROBE_TIMEOUT.min(self.source.connect_timeout);
        let passed = probe(&mut stream, &token, within).await;
        passed.map_err(|e| Status::unavailable(format!("lane to {address}: {e}")))?;
        stream.into_std().map_err(unavailable)
    }

    async fn connect(&self, address: &str) -> std::io::Result<tokio::net::TcpStream> {
        let mut last = std::io::ErrorKind::AddrNotAvailable.into();
        for at in tokio::net::lookup_host(address).await? {
            let socket = if at.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
            self.tuning.pace(&socket);
            outlive_outages(&socket, LEAST_PATIENCE.max(self.source.demand_timeout * 2));
            match socket.connect(at).await {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}
