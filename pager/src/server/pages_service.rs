//! The `Pages` service of a source: agrees on lanes.

use tonic::service::Routes;
use tonic::{Request, Response, Status};

use crate::lane::{PROTOCOL_VERSION, TOKEN_KEY};
use crate::layout::page_run::PageRun;
use crate::proto::open_lane_request::Lane;
use crate::proto::pages_server::{Pages, PagesServer};
use crate::proto::{OpenLaneReply, OpenLaneRequest};
use crate::source::SourceServer;

/// Largest request: a destination may lack many ranges.
const MAX_REQUEST_BYTES: usize = 64 << 20;

/// Serves the lanes of one source.
#[derive(Debug, Clone)]
struct PagesService(SourceServer);

/// The gRPC routes of a source's port.
pub fn routes(server: SourceServer) -> Routes {
    Routes::new(PagesServer::new(PagesService(server)).max_decoding_message_size(MAX_REQUEST_BYTES)).prepare()
}

#[tonic::async_trait]
impl Pages for PagesService {
    async fn open_lane(&self, request: Request<OpenLaneRequest>) -> Result<Response<OpenLaneReply>, Status> {
        let given = request.metadata().get(TOKEN_KEY).map(|value| value.as_bytes());
        if !given.is_some_and(|given| self.0.knows_token(given)) {
            return Err(Status::unauthenticated(format!("{TOKEN_KEY}: missing or wrong")));
        }
        let request = request.into_inner();
        if request.protocol_version != PROTOCOL_VERSION {
            return Err(Status::failed_precondition(format!(
                "protocol_version: {}, this pager speaks {PROTOCOL_VERSION}: run the same release on both hosts",
                request.protocol_version
            )));
        }
        let token = match request.lane.ok_or_else(|| Status::invalid_argument("lane: is missing"))? {
            Lane::Urgent(_) => self.0.agree_urgent(),
            Lane::Bulk(bulk) => {
                let run = |range: crate::proto::PageRange| PageRun {
                    region: range.region,
                    page: range.page,
                    count: range.count,
                };
                self.0.agree_bulk(bulk.lacking.into_iter().map(run))?
            }
        };
        let token = token.map_err(|e| Status::internal(format!("getrandom: {e}")))?.to_vec().into();
        Ok(Response::new(OpenLaneReply { address: String::new(), token }))
    }
}
