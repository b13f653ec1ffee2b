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
use tracing::{info, warn};

use super::{bulk_lane, urgent_lane};
use crate::lane::frame::{HELLO_BYTES, LaneToken, MAGIC};
use crate::lane::path::{LANE_USER_TIMEOUT, answer_probe, outlive_outages};
use crate::source::lane_tokens::Agreed;
use crate::source::{SourceServer, lock};

/// The first bytes of an HTTP/2 connection (RFC 9113, section 3.4).
const HTTP2: [u8; MAGIC.len()] = *b"PRI * HT";
/// For the first bytes of a connection.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// For a destination to read why its lane ends.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a connection is refused.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("it says nothing")]
    Silent,
    #[error("half a hello")]
    HalfHello,
    #[error("half a probe")]
    HalfProbe,
    #[error("neither HTTP/2 nor a lane")]
    UnknownProtocol,
    #[error("no lane was agreed with its token")]
    UnknownToken,
    #[error(transparent)]
    Connection(#[from] io::Error),
    #[error("{0}")]
    Grpc(Box<dyn std::error::Error + Send + Sync>),
}

static NEXT_LANE: AtomicU64 = AtomicU64::new(1);

/// Accepts lanes until `stop`; each gets a thread of its own. HTTP/2 connections to the same port are served by `grpc`.
///
/// # Errors
/// The listener fails for good.
pub async fn accept(
    server: SourceServer,
    grpc: Routes,
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
                let (server, grpc) = (server.clone(), grpc.clone());
                tokio::spawn(async move {
                    if let Err(error) = serve_connection(server, grpc, stream, peer).await {
                        warn!(%peer, %error, "lane.refused");
                    }
                });
            }
            // The connection ended before it was accepted, or descriptors ran out: for this one, not for all.
            Err(error) => {
                warn!(%error, "lane.refused");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

async fn serve_connection(
    server: SourceServer,
    grpc: Routes,
    mut stream: TcpStream,
    peer: SocketAddr,
) -> Result<(), Refused> {
    stream.set_nodelay(true)?;
    outlive_outages(&stream, LANE_USER_TIMEOUT);
    let first = tokio::time::timeout(HELLO_TIMEOUT, first_bytes(&stream)).await.map_err(|_| Refused::Silent)??;
    if first == HTTP2 {
        return serve_grpc(grpc, stream).await;
    }
    if first != MAGIC {
        return Err(Refused::UnknownProtocol);
    }
    let mut hello = [0; HELLO_BYTES];
    let read = tokio::time::timeout(HELLO_TIMEOUT, stream.read_exact(&mut hello)).await;
    read.map_err(|_| Refused::HalfHello)?.map_err(|_| Refused::HalfHello)?;
    let mut token = LaneToken::default();
    token.copy_from_slice(&hello[MAGIC.len()..]);
    let agreed = lock(&server.0.lane_tokens).redeem(&token).ok_or(Refused::UnknownToken)?;
    let probed = tokio::time::timeout(HELLO_TIMEOUT, answer_probe(&mut stream)).await;
    probed.map_err(|_| Refused::HalfProbe)?.map_err(|_| Refused::HalfProbe)?;
    Ok(start_lane(server, stream, peer, agreed)?)
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

async fn serve_grpc(grpc: Routes, stream: TcpStream) -> Result<(), Refused> {
    let http = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new()).http2_only();
    http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(grpc)).await.map_err(Refused::Grpc)
}

fn start_lane(server: SourceServer, stream: TcpStream, peer: SocketAddr, agreed: Agreed) -> io::Result<()> {
    let lane = NEXT_LANE.fetch_add(1, Ordering::Relaxed);
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    let urgent = matches!(agreed, Agreed::Urgent);
    let name = if urgent { format!("urgent-{lane}") } else { format!("bulk-{lane}") };
    std::thread::Builder::new().name(name).spawn(move || {
        info!(lane, %peer, urgent, "lane.opened");
        if urgent { &server.0.tuning.page_path_cpus } else { &server.0.tuning.lane_cpus }.pin();
        let outcome = stream.try_clone().map_err(Into::into).and_then(|stream| match agreed {
            Agreed::Urgent => urgent_lane::run(&server, stream),
            Agreed::Bulk(order) => bulk_lane::run(&server, stream, order),
        });
        match outcome {
            Ok(()) => info!(lane, "lane.closed"),
            Err(error) => warn!(lane, %error, "lane.closed"),
        }
        close(&stream);
    })?;
    Ok(())
}

/// Closes once the destination has read all sent bytes. Unread requests would reset the connection before.
fn close(mut stream: &std::net::TcpStream) {
    let _ = stream.shutdown(Shutdown::Write);
    let _ = stream.set_read_timeout(Some(CLOSE_TIMEOUT));
    let mut rest = [0; 4096];
    while io::Read::read(&mut stream, &mut rest).is_ok_and(|n| n > 0) {}
}
