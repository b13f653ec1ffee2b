//! A source of pages of the test's own: only the protobuf contract is shared with the program under test. The framing
//! of lanes is written a second time here, from the comments of pages.proto.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};
use vmferry_pager::proto::open_lane_request::Lane;
use vmferry_pager::proto::pages_server::{Pages, PagesServer};
use vmferry_pager::proto::{ErrorOrigin, OpenLaneReply, OpenLaneRequest, PageRange};

use super::{PAGE, byte_of};

pub const TOKEN: &str = "one-time-token";

const MOST_DATA_PAGES: u64 = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Data,
    Zero,
    Poison {
        guest_visible: bool,
    },
    Silence,
    /// Nothing, and a bulk lane that lacks the page is not ended.
    Stall,
}

/// What the source holds at a page.
pub type Plan = fn(u64) -> Answer;

type LaneToken = [u8; 32];

#[derive(Clone)]
struct Service {
    plan: Arc<Mutex<Plan>>,
    demanded: Arc<Mutex<Vec<u64>>>,
    /// Lanes that were agreed on and have not connected.
    agreed: Arc<Mutex<HashMap<LaneToken, Lane>>>,
    lane_address: String,
}

/// The 24 bytes of a frame of region 0.
fn frame(kind: u8, poison: (ErrorOrigin, bool, u32), page: u64, count: u64) -> Vec<u8> {
    let (origin, guest_visible, hop) = poison;
    let mut bytes = vec![kind, u8::try_from(i32::from(origin)).unwrap(), guest_visible.into(), 0];
    bytes.extend(0u32.to_le_bytes());
    bytes.extend(page.to_le_bytes());
    bytes.extend(u32::try_from(count).unwrap().to_le_bytes());
    bytes.extend(hop.to_le_bytes());
    assert_eq!(bytes.len(), 24);
    bytes
}

const PROBE_BYTES: usize = 16384;
const NO_POISON: (ErrorOrigin, bool, u32) = (ErrorOrigin::Unspecified, false, 0);

fn data_frames(page: u64, count: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    for first in (page..page + count).step_by(MOST_DATA_PAGES as usize) {
        let end = (first + MOST_DATA_PAGES).min(page + count);
        bytes.extend(frame(1, NO_POISON, first, end - first));
        bytes.extend((first..end).flat_map(|p| [byte_of(p); PAGE as usize]));
    }
    bytes
}

impl Service {
    /// Consecutive pages with one answer share a frame, so that pages known otherwise lie in the middle of frames.
    fn frames(&self, page: u64, count: u64) -> Vec<u8> {
        let plan = *self.plan.lock().unwrap();
        let mut bytes = Vec::new();
        let (mut page, end) = (page, page + count);
        while page < end {
            let count = (page..end).take_while(|p| plan(*p) == plan(page)).count() as u64;
            bytes.extend(match plan(page) {
                Answer::Data => data_frames(page, count),
                Answer::Zero => frame(2, NO_POISON, page, count),
                Answer::Poison { guest_visible } => frame(3, (ErrorOrigin::Read, guest_visible, 1), page, count),
                Answer::Silence | Answer::Stall => Vec::new(),
            });
            page += count;
        }
        bytes
    }

    async fn serve_lanes(self, listener: TcpListener) {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let service = self.clone();
            // An error is a pager that hung up.
            tokio::spawn(async move { service.lane(stream).await });
        }
    }

    async fn lane(&self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let (mut magic, mut token) = ([0; 8], LaneToken::default());
        stream.read_exact(&mut magic).await?;
        stream.read_exact(&mut token).await?;
        stream.read_exact(&mut [0; PROBE_BYTES]).await?;
        stream.write_all(b"VMFLANE1").await?;
        stream.write_all(&[0; PROBE_BYTES]).await?;
        let agreed = self.agreed.lock().unwrap().remove(&token);
        match agreed {
            Some(Lane::Urgent(_)) if &magic == b"VMFLANE1" => self.urgent(stream).await,
            Some(Lane::Bulk(bulk)) if &magic == b"VMFLANE1" => self.bulk(stream, &bulk.lacking).await,
            _ => Ok(()),
        }
    }

    async fn urgent(&self, mut stream: TcpStream) -> io::Result<()> {
        loop {
            let mut ask = [0; 16];
            stream.read_exact(&mut ask).await?;
            let region = u32::from_le_bytes(ask[0..4].try_into().unwrap());
            let count = u32::from_le_bytes(ask[4..8].try_into().unwrap());
            let page = u64::from_le_bytes(ask[8..16].try_into().unwrap());
            assert_eq!(region, 0);
            self.demanded.lock().unwrap().push(page);
            stream.write_all(&self.frames(page, count.into())).await?;
        }
    }

    async fn bulk(&self, mut stream: TcpStream, lacking: &[PageRange]) -> io::Result<()> {
        for range in lacking {
            assert_eq!(range.region, 0);
            stream.write_all(&self.frames(range.page, range.count)).await?;
        }
        let plan = *self.plan.lock().unwrap();
        if lacking.iter().any(|range| (range.page..range.page + range.count).any(|page| plan(page) == Answer::Stall)) {
            // Until the pager hangs up.
            stream.read_exact(&mut [0]).await?;
        }
        stream.write_all(&frame(4, NO_POISON, 0, 0)).await?;
        stream.shutdown().await
    }
}

#[tonic::async_trait]
impl Pages for Service {
    async fn open_lane(&self, request: Request<OpenLaneRequest>) -> Result<Response<OpenLaneReply>, Status> {
        match request.metadata().get("vmferry-lane-token") {
            Some(token) if token == TOKEN => {}
            _ => return Err(Status::unauthenticated("wrong token")),
        }
        let request = request.into_inner();
        if request.protocol_version != 3 {
            return Err(Status::failed_precondition("protocol_version: not 3"));
        }
        let mut token = LaneToken::default();
        std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut token)?;
        self.agreed.lock().unwrap().insert(token, request.lane.ok_or(Status::invalid_argument("lane: missing"))?);
        let address = self.lane_address.clone();
        Ok(Response::new(OpenLaneReply { address, token: token.to_vec().into() }))
    }
}

pub struct StandIn {
    plan: Arc<Mutex<Plan>>,
    demanded: Arc<Mutex<Vec<u64>>>,
    running: Option<(String, oneshot::Sender<()>, std::thread::JoinHandle<()>)>,
}

fn listener() -> (std::net::TcpListener, String) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

impl StandIn {
    pub fn start(plan: Plan) -> Self {
        let mut source = Self { plan: Arc::new(Mutex::new(plan)), demanded: Arc::default(), running: None };
        source.run();
        source
    }

    /// Two ports: one for gRPC, one for lanes, which `OpenLaneReply` names.
    fn run(&mut self) {
        let ((grpc, address), (lanes, lane_address)) = (listener(), listener());
        let (plan, demanded) = (self.plan.clone(), self.demanded.clone());
        let service = Service { plan, demanded, agreed: Arc::default(), lane_address };
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            // Dropping the runtime closes every connection at once, as the death of a source does.
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let incoming = TcpListenerStream::new(TcpListener::from_std(grpc).unwrap());
                let pages = tonic::transport::Server::builder().add_service(PagesServer::new(service.clone()));
                tokio::select! {
                    served = pages.serve_with_incoming(incoming) => served.unwrap(),
                    () = service.serve_lanes(TcpListener::from_std(lanes).unwrap()) => {}
                    _ = stopped => {}
                }
            });
        });
        self.running = Some((address, stop, thread));
    }

    pub fn address(&self) -> String {
        self.running.as_ref().unwrap().0.clone()
    }

    pub fn answer(&self, plan: Plan) {
        *self.plan.lock().unwrap() = plan;
    }

    pub fn demanded(&self) -> Vec<u64> {
        self.demanded.lock().unwrap().clone()
    }

    pub async fn stop(&mut self) {
        let (_, stop, thread) = self.running.take().unwrap();
        let _ = stop.send(());
        super::eventually("the source stops", async || thread.is_finished()).await;
    }

    pub async fn restart(&mut self) {
        self.run();
    }
}
