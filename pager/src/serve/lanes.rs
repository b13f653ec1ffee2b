//! Lanes: each TCP connection has a thread and a runtime of its own, in which its requests are read and answered.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::stream::{self, BoxStream, StreamExt};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};
use tracing::{info, warn};

use super::push_order::PushOrder;
use super::{SourceServer, check_version};
use crate::proto::pages_server::{Pages, PagesServer};
use crate::{priority, proto};

/// Request metadata that carries the lane token.
pub const TOKEN_KEY: &str = "vmferry-lane-token";

/// HTTP/2 flow-control window of a stream and of a connection: more than a lane ever has on the wire.
const WINDOW: u32 = 16 << 20;

/// Largest request: a destination may lack many ranges.
const MAX_REQUEST_BYTES: usize = 64 << 20;

static NEXT_LANE: AtomicU64 = AtomicU64::new(1);

pub(super) async fn accept(
    server: SourceServer,
    listener: TcpListener,
    stop: impl Future<Output = ()>,
) -> std::io::Result<()> {
    let mut stop = pin!(stop);
    loop {
        let accepted = tokio::select! {
            () = &mut stop => return Ok(()),
            accepted = listener.accept() => accepted,
        };
        // The connection ended before it was accepted, or descriptors or threads ran out: for this lane, not for all.
        if let Err(error) = accepted.and_then(|(stream, peer)| open_lane(&server, stream, peer)) {
            warn!(event = "lane.refused", %error);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

fn open_lane(server: &SourceServer, stream: TcpStream, peer: SocketAddr) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let lane = NEXT_LANE.fetch_add(1, Ordering::Relaxed);
    info!(event = "lane.opened", lane, %peer);
    let (stream, server) = (stream.into_std()?, server.clone());
    std::thread::Builder::new().name(format!("lane-{lane}")).spawn(move || match run_lane(stream, server) {
        Ok(()) => info!(event = "lane.closed", lane),
        Err(error) => warn!(event = "lane.closed", lane, %error),
    })?;
    Ok(())
}

fn run_lane(stream: std::net::TcpStream, server: SourceServer) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let pages =
        PagesServer::new(server).max_decoding_message_size(MAX_REQUEST_BYTES).max_encoding_message_size(usize::MAX);
    let service = TowerToHyperService::new(Routes::new(pages).prepare());
    runtime.block_on(async move {
        let mut http = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new()).http2_only();
        http.http2().initial_stream_window_size(WINDOW).initial_connection_window_size(WINDOW);
        http.serve_connection(TokioIo::new(TcpStream::from_std(stream)?), service).await
    })
}

#[tonic::async_trait]
impl Pages for SourceServer {
    type DemandStream = BoxStream<'static, Result<proto::PageReply, Status>>;
    type PushStream = BoxStream<'static, Result<proto::PageReply, Status>>;

    async fn demand(
        &self,
        request: Request<Streaming<proto::PageRequest>>,
    ) -> Result<Response<Self::DemandStream>, Status> {
        self.authenticate(&request)?;
        priority::urgent();
        let server = self.clone();
        let replies = request.into_inner().map(move |asked| server.answer(&asked?));
        Ok(Response::new(replies.boxed()))
    }

    async fn push(&self, request: Request<proto::PushRequest>) -> Result<Response<Self::PushStream>, Status> {
        self.authenticate(&request)?;
        let request = request.into_inner();
        check_version(request.protocol_version)?;
        let lacking = request.lacking.iter().map(|range| self.checked(range)).collect::<Result<Vec<_>, _>>()?;
        let mut order = PushOrder::new(self.layout(), lacking);
        let server = self.clone();
        let chunks = stream::iter(std::iter::from_fn(move || order.next_chunk(server.latest_demand())));
        let server = self.clone();
        let replies = chunks.map(move |chunk| {
            let read = chunk.into_iter().map(|run| server.0.read(run)).collect::<Result<Vec<_>, _>>()?;
            Ok(proto::PageReply { runs: read.into_iter().flatten().collect() })
        });
        Ok(Response::new(replies.boxed()))
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

/// Compares in a time that does not depend on where they differ.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |all, (x, y)| all | (x ^ y)) == 0
}
