//! The source's port: gRPC connections agree on lanes, and the lanes come to the same port; their first bytes tell which
//! is which. Each lane has a thread of its own.

use std::future::Future;
use std::io;
use std::net::{Shutdown, SocketAddr};
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::{TcpListener, TcpStream};
use tonic::service::Routes;
use tonic::{Request, Response, Status};
use tracing::{info, warn};

use super::{bulk_lane, urgent_lane};
use crate::lane::frame::{HELLO_BYTES, LaneToken, MAGIC};
use crate::lane::path::{LANE_PATIENCE, answer_probe, outlive_outages};
use crate::lane::{PROTOCOL_VERSION, TOKEN_KEY};
use crate::layout::page_run::PageRun;
use crate::proto;
use crate::proto::open_lane_request::Lane;
use crate::proto::pages_server::PagesServer;
use crate::source::lane_tokens::{Agreed, same};
use crate::source::push_order::PushOrder;
use crate::source::{SourceError, SourceServer, lock};

/// What an HTTP/2 connection begins with (RFC 9113, section 3.4).
const HTTP2: [u8; MAGIC.len()] = *b"PRI * HT";
/// Largest request: a destination may lack many ranges.
const MAX_REQUEST_BYTES: usize = 64 << 20;
/// For the first bytes of a connection.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// For a destination to read why its lane ends.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

static NEXT_LANE: AtomicU64 = AtomicU64::new(1);

pub(in crate::source) async fn accept(
    server: SourceServer,
    listener: TcpListener,
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    let mut stop = pin!(stop);
    loop {
        let accepted = tokio::select! {
            () = &mut stop => return Ok(()),
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                let server = server.clone();
                tokio::spawn(async move {
                    if let Err(error) = serve_connection(server, stream, peer).await {
                        warn!(event = "lane.refused", %peer, error);
                    }
                });
            }
            // The connection ended before it was accepted, or descriptors ran out: for this one, not for all.
            Err(error) => {
                warn!(event = "lane.refused", %error);
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

async fn serve_connection(server: SourceServer, mut stream: TcpStream, peer: SocketAddr) -> Result<(), String> {
    stream.set_nodelay(true).map_err(|e| e.to_string())?;
    outlive_outages(&stream, LANE_PATIENCE);
    let first = tokio::time::timeout(HELLO_TIMEOUT, first_bytes(&stream)).await;
    let first = first.map_err(|_| "it says nothing".to_owned())?.map_err(|e| e.to_string())?;
    if first == HTTP2 {
        return serve_grpc(server, stream).await;
    }
    if first != MAGIC {
        return Err("neither HTTP/2 nor a lane".into());
    }
    let mut hello = [0; HELLO_BYTES];
    let read = tokio::time::timeout(HELLO_TIMEOUT, stream.read_exact(&mut hello)).await;
    read.map_err(|_| "half a hello".to_owned())?.map_err(|e| format!("half a hello: {e}"))?;
    let mut token = LaneToken::default();
    token.copy_from_slice(&hello[MAGIC.len()..]);
    let Some(agreed) = lock(&server.0.lane_tokens).redeem(&token) else {
        return Err("no lane was agreed with its token".into());
    };
    let probed = tokio::time::timeout(HELLO_TIMEOUT, answer_probe(&mut stream)).await;
    probed.map_err(|_| "half a probe".to_owned())?.map_err(|e| format!("half a probe: {e}"))?;
    start_lane(server, stream, peer, agreed).map_err(|e| e.to_string())
}

/// The first bytes of a connection, left where they are.
async fn first_bytes(stream: &TcpStream) -> io::Result<[u8; MAGIC.len()]> {
    let mut first = [0; MAGIC.len()];
    loop {
        let n = stream.peek(&mut first).await?;
        if n == first.len() {
            return Ok(first);
        }
        if n == 0 || stream.ready(Interest::READABLE).await?.is_read_closed() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // A peek is ready at the first byte; the others are under way.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn serve_grpc(server: SourceServer, stream: TcpStream) -> Result<(), String> {
    let pages = PagesServer::new(server).max_decoding_message_size(MAX_REQUEST_BYTES);
    let service = TowerToHyperService::new(Routes::new(pages).prepare());
    let http = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new()).http2_only();
    http.serve_connection(TokioIo::new(stream), service).await.map_err(|e| e.to_string())
}

fn start_lane(server: SourceServer, stream: TcpStream, peer: SocketAddr, agreed: Agreed) -> io::Result<()> {
    let lane = NEXT_LANE.fetch_add(1, Ordering::Relaxed);
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    let urgent = matches!(agreed, Agreed::Urgent);
    let name = if urgent { format!("urgent-{lane}") } else { format!("bulk-{lane}") };
    std::thread::Builder::new().name(name).spawn(move || {
        info!(event = "lane.opened", lane, %peer, urgent);
        if urgent { &server.0.tuning.page_path_cpus } else { &server.0.tuning.lane_cpus }.pin();
        let outcome = stream.try_clone().map_err(Into::into).and_then(|stream| match agreed {
            Agreed::Urgent => urgent_lane::run(&server, stream),
            Agreed::Bulk(order) => bulk_lane::run(&server, stream, order),
        });
        match outcome {
            Ok(()) => info!(event = "lane.closed", lane),
            Err(error) => warn!(event = "lane.closed", lane, %error),
        }
        close(&stream);
    })?;
    Ok(())
}

/// Closes once the destination has read what was sent: asks that nobody reads would reset the connection before.
fn close(mut stream: &std::net::TcpStream) {
    let _ = stream.shutdown(Shutdown::Write);
    let _ = stream.set_read_timeout(Some(CLOSE_TIMEOUT));
    let mut rest = [0; 4096];
    while io::Read::read(&mut stream, &mut rest).is_ok_and(|n| n > 0) {}
}

#[tonic::async_trait]
impl proto::pages_server::Pages for SourceServer {
    async fn open_lane(
        &self,
        request: Request<proto::OpenLaneRequest>,
    ) -> Result<Response<proto::OpenLaneReply>, Status> {
        self.authenticate(&request)?;
        let request = request.into_inner();
        if request.protocol_version != PROTOCOL_VERSION {
            return Err(Status::failed_precondition(format!(
                "protocol_version: {}, this pager speaks {PROTOCOL_VERSION}: run the same release on both hosts",
                request.protocol_version
            )));
        }
        let agreed = match request.lane.ok_or_else(|| Status::invalid_argument("lane: is missing"))? {
            Lane::Urgent(_) => Agreed::Urgent,
            Lane::Bulk(bulk) => {
                let lacking = bulk
                    .lacking
                    .iter()
                    .map(|range| self.checked(PageRun { region: range.region, page: range.page, count: range.count }));
                let lacking = lacking.collect::<Result<Vec<_>, _>>()?;
                self.0.frozen_memory()?;
                Agreed::Bulk(PushOrder::new(&self.0.pages, lacking))
            }
        };
        let token = lock(&self.0.lane_tokens).agree(agreed);
        let token = token.map_err(|e| Status::internal(format!("getrandom: {e}")))?.to_vec().into();
        Ok(Response::new(proto::OpenLaneReply { address: String::new(), token }))
    }
}

impl From<SourceError> for Status {
    fn from(error: SourceError) -> Self {
        let message = error.to_string();
        match error {
            SourceError::Outside { .. } => Self::invalid_argument(message),
            SourceError::NotAttached | SourceError::NotFrozen => Self::failed_precondition(message),
            SourceError::Memory(_) => Self::unavailable(message),
        }
    }
}

impl SourceServer {
    fn authenticate<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let given = request.metadata().get(TOKEN_KEY).map(|value| value.as_bytes());
        if given.is_some_and(|given| same(given, self.token().as_bytes())) {
            return Ok(());
        }
        Err(Status::unauthenticated(format!("{TOKEN_KEY}: missing or wrong")))
    }
}
