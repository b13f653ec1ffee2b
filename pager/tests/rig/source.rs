//! A source of pages of the test's own: only the protobuf contract is shared with the program under test.

use std::sync::{Arc, Mutex};

use tokio::sync::oneshot;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};
use vmferry_pager::proto::pages_server::{Pages, PagesServer};
use vmferry_pager::proto::{self, ErrorOrigin, PageReply, run::Contents};

use super::{PAGE, byte_of};

pub const TOKEN: &str = "one-time-token";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Data,
    Zero,
    Poison { guest_visible: bool },
    Silence,
}

/// What the source holds at a page.
pub type Plan = fn(u64) -> Answer;

#[derive(Clone)]
struct Service {
    plan: Arc<Mutex<Plan>>,
    demanded: Arc<Mutex<Vec<u64>>>,
}

impl Service {
    fn run(&self, page: u64, count: u64) -> Option<proto::Run> {
        let contents = match (self.plan.lock().unwrap())(page) {
            Answer::Data => Contents::Data(
                (page..page + count).flat_map(|p| [byte_of(p); PAGE as usize]).collect::<Vec<_>>().into(),
            ),
            Answer::Zero => Contents::Zero(proto::Zero {}),
            Answer::Poison { guest_visible } => {
                Contents::Poison(proto::Poison { origin: ErrorOrigin::Read.into(), guest_visible, hop: 1 })
            }
            Answer::Silence => return None,
        };
        Some(proto::Run { region: 0, page, count, contents: Some(contents) })
    }

    /// Consecutive pages with one answer make one run, so that pages known otherwise lie in the middle of runs.
    fn runs(&self, range: &proto::PageRange) -> Vec<proto::Run> {
        let plan = *self.plan.lock().unwrap();
        let mut runs = Vec::new();
        let (mut page, end) = (range.page, range.page + range.count);
        while page < end {
            let count = (page..end).take_while(|p| plan(*p) == plan(page)).count() as u64;
            runs.extend(self.run(page, count));
            page += count;
        }
        runs
    }
}

fn check<T>(request: &Request<T>) -> Result<(), Status> {
    match request.metadata().get("vmferry-lane-token") {
        Some(token) if token == TOKEN => Ok(()),
        _ => Err(Status::unauthenticated("wrong token")),
    }
}

#[tonic::async_trait]
impl Pages for Service {
    type DemandStream = ReceiverStream<Result<PageReply, Status>>;
    type PushStream = ReceiverStream<Result<PageReply, Status>>;

    async fn demand(
        &self,
        request: Request<Streaming<proto::PageRequest>>,
    ) -> Result<Response<Self::DemandStream>, Status> {
        check(&request)?;
        let (sender, receiver) = tokio::sync::mpsc::channel(16);
        let service = self.clone();
        tokio::spawn(async move {
            let mut requests = request.into_inner();
            while let Ok(Some(request)) = requests.message().await {
                let range = request.range.unwrap();
                service.demanded.lock().unwrap().push(range.page);
                let runs = service.runs(&range);
                if !runs.is_empty() {
                    let _ = sender.send(Ok(PageReply { runs })).await;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn push(&self, request: Request<proto::PushRequest>) -> Result<Response<Self::PushStream>, Status> {
        check(&request)?;
        let (sender, receiver) = tokio::sync::mpsc::channel(2);
        let service = self.clone();
        tokio::spawn(async move {
            for range in &request.get_ref().lacking {
                for run in service.runs(range) {
                    let _ = sender.send(Ok(PageReply { runs: vec![run] })).await;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

pub struct StandIn {
    service: Service,
    running: Option<(String, oneshot::Sender<()>, std::thread::JoinHandle<()>)>,
}

impl StandIn {
    pub fn start(plan: Plan) -> Self {
        let service = Service { plan: Arc::new(Mutex::new(plan)), demanded: Arc::default() };
        let mut source = Self { service, running: None };
        source.run();
        source
    }

    fn run(&mut self) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (stop, stopped) = oneshot::channel();
        let service = PagesServer::new(self.service.clone());
        let thread = std::thread::spawn(move || {
            // Dropping the runtime closes every connection at once, as the death of a source does.
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let incoming = TcpListenerStream::new(tokio::net::TcpListener::from_std(listener).unwrap());
                tokio::select! {
                    served = tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming) => {
                        served.unwrap();
                    }
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
        *self.service.plan.lock().unwrap() = plan;
    }

    pub fn demanded(&self) -> Vec<u64> {
        self.service.demanded.lock().unwrap().clone()
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
