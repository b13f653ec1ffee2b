//! The program `vmferry-pager`: arguments, sockets, signals.
//!
//! The control service, the memory socket and the events live on the main thread. The fault thread of a destination, its bulk
//! lanes, and each lane of a source have threads of their own.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use crate::pager::Pager;
use crate::proto::PagerRole;
use crate::proto::pager_server::PagerServer;
use crate::sched::cpu_set::CpuSet;
use crate::server::control::ControlService;
use crate::server::memory_socket::{bind_private, serve};
use crate::sys::memory_failure;
use crate::tuning::Tuning;

const DEFAULT_SPIN_US: u64 = 50;
const DEFAULT_CONGESTION_CONTROL: &str = "cubic";

/// Stands between a VM's page faults and their resolution. Driven by vmferryd over DIR/pager.sock.
#[derive(Debug, Parser)]
#[command(name = "vmferry-pager", version)]
pub struct Arguments {
    /// Directory for pager.sock, memory.sock and pages; must exist, best on a tmpfs.
    #[arg(long, value_name = "DIR")]
    runtime_dir: PathBuf,
    /// Name of the VM.
    #[arg(long, value_name = "NAME")]
    vm: String,
    /// Which side of the migration.
    #[arg(long)]
    role: Role,
    /// CPUs of the threads that serve faults, e.g. 2-3,7: fault threads, and a source's urgent lanes; empty: any.
    #[arg(long, value_name = "CPUS", default_value = "")]
    page_path_cpus: CpuSet,
    /// CPUs of the bulk threads: those that read a source's memory, and those that install its pages.
    #[arg(long, value_name = "CPUS", default_value = "")]
    lane_cpus: CpuSet,
    /// Microseconds that the fault thread polls before it sleeps; three times as long while a reply is due. 0: it sleeps at
    /// once.
    #[arg(long, value_name = "US", default_value_t = DEFAULT_SPIN_US)]
    spin_us: u64,
    /// Whether the fault thread, and bulk threads that receive in place, are real-time during a heavy push (needs
    /// CAP_SYS_NICE).
    #[arg(long, value_name = "BOOL", action = clap::ArgAction::Set, default_value_t = true)]
    real_time: bool,
    /// Whether CPUs stay out of their idle states while the guest faults (needs /dev/cpu_dma_latency).
    #[arg(long, value_name = "BOOL", action = clap::ArgAction::Set, default_value_t = true)]
    keep_awake: bool,
    /// Whether preallocated memory consists of huge pages if they cost no more than small ones.
    #[arg(long, value_name = "BOOL", action = clap::ArgAction::Set, default_value_t = true)]
    huge_pages: bool,
    /// TCP congestion control of the lanes; empty: the host's.
    #[arg(long, value_name = "NAME", default_value = DEFAULT_CONGESTION_CONTROL)]
    congestion_control: String,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Role {
    Source,
    Destination,
}

/// Runs the program; returns when it was shut down, or by SIGTERM when it guards nothing.
///
/// # Errors
/// A socket cannot be made or served.
pub fn run() -> std::io::Result<()> {
    let arguments = Arguments::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_env("VMFERRY_PAGER_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt().json().with_env_filter(filter).with_writer(std::io::stderr).init();
    memory_failure::refuse_early_errors()?;
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let role = match arguments.role {
            Role::Source => PagerRole::Source,
            Role::Destination => PagerRole::Destination,
        };
        let Arguments {
            runtime_dir,
            vm,
            page_path_cpus,
            lane_cpus,
            spin_us,
            real_time,
            keep_awake,
            huge_pages,
            congestion_control,
            ..
        } = arguments;
        let spin = Duration::from_micros(spin_us);
        let tuning = Tuning { spin, page_path_cpus, lane_cpus, real_time, keep_awake, huge_pages, congestion_control };
        serve_vm(runtime_dir, vm, role, tuning).await
    })
}

/// Serves one VM on one side until it is shut down.
///
/// # Errors
/// A socket cannot be made or served.
pub async fn serve_vm(directory: PathBuf, vm: String, role: PagerRole, tuning: Tuning) -> std::io::Result<()> {
    let pager = Pager::new(vm, role, directory.clone(), tuning);
    let (control, memory) = (directory.join("pager.sock"), directory.join("memory.sock"));
    let memory_listener = bind_private(&memory)?;
    let control_listener = bind_private(&control)?;
    tracing::info!(vm = pager.vm, role = role.as_str_name(), pid = std::process::id(), "pager.started");
    let service = PagerServer::new(ControlService(pager.clone())).max_decoding_message_size(64 << 20);
    let ended = pager.clone();
    let control_service = Server::builder()
        .add_service(service)
        .serve_with_incoming_shutdown(UnixListenerStream::new(control_listener), async move { ended.ended().await });
    let outcome = tokio::select! {
        outcome = control_service => outcome.map_err(std::io::Error::other),
        outcome = serve(memory_listener, pager.clone()) => outcome,
        outcome = terminated(pager.clone()) => outcome,
        // Watchers of events keep their streams open: they are not waited for longer than this.
        () = after_end(pager.clone()) => Ok(()),
    };
    for socket in [control, memory] {
        let _ = std::fs::remove_file(socket);
    }
    tracing::info!("pager.ended");
    outcome
}

async fn after_end(pager: Arc<Pager>) {
    pager.ended().await;
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
}

/// SIGTERM and SIGINT end a pager that guards nothing; one that does keeps serving, because a guest depends on it.
async fn terminated(pager: Arc<Pager>) -> std::io::Result<()> {
    let (mut term, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    loop {
        tokio::select! {
            _ = term.recv() => {}
            _ = interrupt.recv() => {}
        }
        match pager.guards().await {
            None => {
                pager.shut_down().await;
                return Ok(());
            }
            Some(guards) => tracing::warn!(guards, "pager.signal_ignored"),
        }
    }
}
