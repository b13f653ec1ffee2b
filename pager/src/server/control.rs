//! The Pager service: translates calls, decides nothing.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use crate::destination::command::Command;
use crate::event_log::EventLog;
use crate::lane::connect::SourceAddress;
use crate::layout::MemoryLayout;
use crate::pager::Pager;
use crate::proto::{self, PagerRole, pager_server};
use crate::server::pages_service::routes;

/// Bulk lanes if the daemon names no number.
const DEFAULT_LANES: usize = 1;
/// Most of them.
const MAX_LANES: u32 = 8;

/// Serves one pager.
#[derive(Debug, Clone)]
pub struct ControlService(pub Arc<Pager>);

type Answer<T> = Result<Response<T>, Status>;

fn layout_of(layout: Option<&proto::MemoryLayout>) -> Result<MemoryLayout, Status> {
    let layout = layout.ok_or_else(|| Status::invalid_argument("layout: is missing"))?;
    MemoryLayout::try_from(layout).map_err(|e| Status::invalid_argument(format!("layout.{e}")))
}

fn positive(name: &str, seconds: f64) -> Result<Duration, Status> {
    let time = Duration::try_from_secs_f64(seconds).ok().filter(|time| !time.is_zero());
    time.ok_or_else(|| Status::invalid_argument(format!("{name}: {seconds} is not positive")))
}

fn port(name: &str, value: u32) -> Result<u16, Status> {
    u16::try_from(value).map_err(|_| Status::invalid_argument(format!("{name}: {value} is no port")))
}

#[tonic::async_trait]
impl pager_server::Pager for ControlService {
    async fn get_status(&self, _: Request<proto::GetStatusRequest>) -> Answer<proto::PagerStatus> {
        Ok(Response::new(self.0.status().await?))
    }

    async fn serve_source(&self, request: Request<proto::ServeSourceRequest>) -> Answer<proto::ServeSourceReply> {
        let request = request.into_inner();
        let layout = layout_of(request.layout.as_ref())?;
        let ip = request.listen_ip.parse();
        let ip =
            ip.map_err(|_| Status::invalid_argument(format!("listen_ip: {:?} is no address", request.listen_ip)))?;
        let ports = port("port_first", request.port_first)?..port("port_last", request.port_last)?;
        if request.token.is_empty() {
            return Err(Status::invalid_argument("token: is empty"));
        }
        let address = self.0.serve_source(layout, ip, ports, request.token, request.push_bytes_per_s, routes).await?;
        Ok(Response::new(proto::ServeSourceReply { lane_address: address.to_string() }))
    }

    async fn freeze(&self, _: Request<proto::FreezeRequest>) -> Answer<proto::FreezeReply> {
        let server = self.0.server().await?;
        server.freeze()?;
        Ok(Response::new(proto::FreezeReply {}))
    }

    async fn thaw(&self, _: Request<proto::ThawRequest>) -> Answer<proto::ThawReply> {
        self.0.server().await?.thaw();
        Ok(Response::new(proto::ThawReply {}))
    }

    async fn expect_destination(
        &self,
        request: Request<proto::ExpectDestinationRequest>,
    ) -> Answer<proto::ExpectDestinationReply> {
        let layout = layout_of(request.get_ref().layout.as_ref())?;
        let uffd_features = self.0.expect_destination(layout).await?;
        Ok(Response::new(proto::ExpectDestinationReply { uffd_features }))
    }

    async fn connect_lanes(&self, request: Request<proto::ConnectLanesRequest>) -> Answer<proto::ConnectLanesReply> {
        let request = request.into_inner();
        let source = SourceAddress {
            address: request.lane_address,
            token: request.token,
            demand_timeout: positive("demand_timeout_s", request.demand_timeout_s)?,
            connect_timeout: positive("connect_timeout_s", request.connect_timeout_s)?,
        };
        self.0.destination().await?.connect(source).await?;
        Ok(Response::new(proto::ConnectLanesReply {}))
    }

    async fn start_push(&self, request: Request<proto::StartPushRequest>) -> Answer<proto::StartPushReply> {
        let lanes = match request.get_ref().lanes {
            0 => DEFAULT_LANES,
            lanes if lanes <= MAX_LANES => lanes as usize,
            lanes => return Err(Status::invalid_argument(format!("lanes: {lanes} are more than {MAX_LANES}"))),
        };
        self.0.destination().await?.ask(|answer| Command::StartPush(lanes, answer)).await??;
        Ok(Response::new(proto::StartPushReply {}))
    }

    async fn complete(&self, _: Request<proto::CompleteRequest>) -> Answer<proto::CompleteReply> {
        let guarded_pages = self.0.destination().await?.ask(Command::Complete).await??;
        Ok(Response::new(proto::CompleteReply { guarded_pages }))
    }

    async fn list_held(&self, _: Request<proto::ListHeldRequest>) -> Answer<proto::ListHeldReply> {
        let server = self.0.server().await?;
        let held = tokio::task::spawn_blocking(move || server.held()).await;
        let held = held.map_err(|e| Status::internal(e.to_string()))??;
        Ok(Response::new(proto::ListHeldReply { held }))
    }

    async fn preallocate(&self, request: Request<proto::PreallocateRequest>) -> Answer<proto::PreallocateReply> {
        let (layout, destination) = self.0.destination_layout().await?;
        let bytes = destination.preallocate(&layout, request.into_inner().held).await?;
        Ok(Response::new(proto::PreallocateReply { bytes }))
    }

    async fn set_push_limit(&self, request: Request<proto::SetPushLimitRequest>) -> Answer<proto::SetPushLimitReply> {
        self.0.server().await?.limit_push(request.get_ref().push_bytes_per_s);
        Ok(Response::new(proto::SetPushLimitReply {}))
    }

    async fn mark_poisoned(&self, request: Request<proto::MarkPoisonedRequest>) -> Answer<proto::MarkPoisonedReply> {
        let errors = request.into_inner().errors;
        let reply = match self.0.role {
            PagerRole::Source => {
                let outcome = self.0.server().await?.mark_poisoned(&errors);
                let (marked, already, healed) = (outcome.marked, outcome.already, outcome.healed);
                proto::MarkPoisonedReply { marked, already, healed, unmarked: 0 }
            }
            _ => self.0.destination().await?.ask(|answer| Command::MarkPoisoned(errors, answer)).await?,
        };
        Ok(Response::new(reply))
    }

    async fn forget_replaced(&self, _: Request<proto::ForgetReplacedRequest>) -> Answer<proto::ForgetReplacedReply> {
        let replaced = match self.0.role {
            PagerRole::Source => 0,
            _ => self.0.destination().await?.ask(Command::ForgetReplaced).await?,
        };
        Ok(Response::new(proto::ForgetReplacedReply { replaced }))
    }

    type WatchEventsStream = Pin<Box<dyn Stream<Item = Result<proto::PagerEvent, Status>> + Send>>;

    async fn watch_events(&self, request: Request<proto::WatchEventsRequest>) -> Answer<Self::WatchEventsStream> {
        Ok(Response::new(Box::pin(follow(self.0.events.clone(), request.get_ref().after))))
    }

    async fn acknowledge_events(
        &self,
        request: Request<proto::AcknowledgeEventsRequest>,
    ) -> Answer<proto::AcknowledgeEventsReply> {
        self.0.events.acknowledge(request.get_ref().up_to);
        Ok(Response::new(proto::AcknowledgeEventsReply {}))
    }

    async fn shutdown(&self, request: Request<proto::ShutdownRequest>) -> Answer<proto::ShutdownReply> {
        if !request.get_ref().even_if_guest_dies
            && let Some(guards) = self.0.guards().await
        {
            return Err(Status::failed_precondition(guards));
        }
        self.0.shut_down().await;
        Ok(Response::new(proto::ShutdownReply {}))
    }
}

/// Kept events after a number, then those to come.
fn follow(log: EventLog, after: u64) -> impl Stream<Item = Result<proto::PagerEvent, Status>> + Send {
    let watch = log.watch();
    let start = (log, watch, after, std::collections::VecDeque::new());
    futures_util::stream::unfold(start, |(log, mut watch, mut after, mut ready)| async move {
        loop {
            if let Some(event) = ready.pop_front() {
                let event: proto::PagerEvent = event;
                return Some((Ok(event), (log, watch, after, ready)));
            }
            watch.mark_unchanged();
            ready.extend(log.after(after));
            match ready.back() {
                Some(newest) => after = newest.number,
                None => watch.changed().await.ok()?,
            }
        }
    })
}
