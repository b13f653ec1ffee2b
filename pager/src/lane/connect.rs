//! The destination's end of `OpenLane`: agrees on a lane by gRPC, connects it, sends the hello.

use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpSocket;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request};

use super::frame::LaneToken;
use super::path::{PathError, outlive_outages, probe};
use super::{PROTOCOL_VERSION, TOKEN_KEY, set_congestion_control};
use crate::proto::open_lane_request::Lane;
use crate::proto::pages_client::PagesClient;
use crate::proto::{BulkLane, OpenLaneRequest, PageRange, UrgentLane};
use crate::sys::tcp::set_interactive;

/// Largest request: a destination may lack many ranges.
const MAX_REQUEST_BYTES: usize = 64 << 20;

/// For some round trips and retransmissions of a few packets each way.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// A lane without requests counts as broken after so long a silence.
const LEAST_PATIENCE: Duration = Duration::from_secs(60);

/// The address of the source's pager, and the secret that it asks for.
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

/// Why a lane cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The address is not "ip:port".
    #[error("lane_address {address}: {source}")]
    InvalidAddress {
        /// The address of the request.
        address: String,
        /// Why it is none.
        source: tonic::transport::Error,
    },
    /// The token cannot be sent as metadata.
    #[error("token: not printable ASCII")]
    InvalidToken,
    /// Nobody answers at the address.
    #[error("source {address}: {cause}")]
    Unreachable {
        /// The source.
        address: String,
        /// The innermost cause.
        cause: String,
    },
    /// The source is silent.
    #[error("source {address}: no answer in {timeout:?}")]
    TimedOut {
        /// The source.
        address: String,
        /// The limit.
        timeout: Duration,
    },
    /// The source refused the lane.
    #[error("{message}")]
    Refused {
        /// Its status code.
        code: Code,
        /// Its reason.
        message: String,
    },
    /// The source's reply is not of the contract.
    #[error("source {address}: a lane token of {bytes} bytes")]
    LaneToken {
        /// The source.
        address: String,
        /// Length of the token.
        bytes: usize,
    },
    /// The connection of the lane failed.
    #[error("lane to {address}: {source}")]
    Lane {
        /// Where it was to connect.
        address: String,
        /// The error of the call, or of the path.
        source: PathError,
    },
}

/// A gRPC connection to the source; clones share it.
#[derive(Debug, Clone)]
pub struct SourceConnection {
    /// The source at its other end.
    pub source: SourceAddress,
    client: PagesClient<Channel>,
    congestion_control: Arc<str>,
}

impl SourceAddress {
    /// Whether this is the same source, whatever the time-outs.
    pub fn is_that_of(&self, other: &Self) -> bool {
        (&self.address, &self.token) == (&other.address, &other.token)
    }

    /// Connects for `OpenLane`. Lanes are to use this TCP congestion control; empty: the host's.
    ///
    /// # Errors
    /// [`ConnectError`]: the address is none, or nobody answers there.
    pub async fn reach(self, congestion_control: &str) -> Result<SourceConnection, ConnectError> {
        let invalid = |source| ConnectError::InvalidAddress { address: self.address.clone(), source };
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).map_err(invalid)?;
        let endpoint = endpoint.tcp_nodelay(true).connect_timeout(self.connect_timeout);
        let connected = self.in_time(endpoint.connect()).await?;
        let channel = connected.map_err(|error| {
            let cause = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
            ConnectError::Unreachable { address: self.address.clone(), cause }
        })?;
        let client = PagesClient::new(channel).max_encoding_message_size(MAX_REQUEST_BYTES);
        Ok(SourceConnection { source: self, client, congestion_control: congestion_control.into() })
    }

    async fn in_time<T>(&self, doing: impl Future<Output = T>) -> Result<T, ConnectError> {
        let late = |_| ConnectError::TimedOut { address: self.address.clone(), timeout: self.connect_timeout };
        tokio::time::timeout(self.connect_timeout, doing).await.map_err(late)
    }
}

impl SourceConnection {
    /// The same connection with the time-outs of another address.
    pub fn with_address(self, source: SourceAddress) -> Self {
        Self { source, ..self }
    }

    /// Opens the urgent lane.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn urgent(self) -> Result<TcpStream, ConnectError> {
        let stream = self.open(Lane::Urgent(UrgentLane {})).await?;
        if let Err(error) = set_interactive(&stream) {
            tracing::debug!(%error, "lane.option_unknown");
        }
        Ok(stream)
    }

    /// Opens a bulk lane for the ranges that are lacking, in pages of 4 KiB.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn bulk(self, lacking: Vec<PageRange>) -> Result<TcpStream, ConnectError> {
        self.open(Lane::Bulk(BulkLane { lacking })).await
    }

    async fn open(mut self, lane: Lane) -> Result<TcpStream, ConnectError> {
        let mut request = Request::new(OpenLaneRequest { protocol_version: PROTOCOL_VERSION, lane: Some(lane) });
        let token: MetadataValue<Ascii> = self.source.token.parse().map_err(|_| ConnectError::InvalidToken)?;
        request.metadata_mut().insert(TOKEN_KEY, token);
        let reply = self.source.in_time(self.client.open_lane(request)).await?;
        let reply = reply
            .map_err(|status| ConnectError::Refused { code: status.code(), message: status.message().to_owned() })?;
        let reply = reply.into_inner();
        let token: LaneToken = reply.token[..]
            .try_into()
            .map_err(|_| ConnectError::LaneToken { address: self.source.address.clone(), bytes: reply.token.len() })?;
        let address = if reply.address.is_empty() { &self.source.address } else { &reply.address };
        let failed = |source| ConnectError::Lane { address: address.clone(), source };
        let connection = |error: io::Error| failed(error.into());
        let mut stream = self.source.in_time(self.connect(address)).await?.map_err(connection)?;
        stream.set_nodelay(true).map_err(connection)?;
        probe(&mut stream, &token, PROBE_TIMEOUT.min(self.source.connect_timeout)).await.map_err(failed)?;
        stream.into_std().map_err(connection)
    }

    async fn connect(&self, address: &str) -> io::Result<tokio::net::TcpStream> {
        let mut last = io::ErrorKind::AddrNotAvailable.into();
        for at in tokio::net::lookup_host(address).await? {
            let socket = if at.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
            set_congestion_control(&socket, &self.congestion_control);
            outlive_outages(&socket, LEAST_PATIENCE.max(self.source.demand_timeout * 2));
            match socket.connect(at).await {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}
