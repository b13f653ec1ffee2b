//! Command line and start of the program.

use std::fmt::Display;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc;

use clap::{Parser, ValueEnum};

use crate::layout::{self, Backing, MadeOf, PAGE_SIZE, PAGE_SIZES};
use crate::machine::{GuestConfig, MakeMachine, Workload};
use crate::memory::{GuestMemory, Transparent};
use crate::protocol::state::Verb;
use crate::vmm::{Event, Vmm};
use crate::{admin, control, kvm, process};

/// What runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Accel {
    /// Virtual CPUs of /dev/kvm.
    Kvm,
    /// Threads of this process, for machines without KVM.
    Process,
}

impl Accel {
    /// What makes its machines.
    pub fn make(self) -> MakeMachine {
        match self {
            Self::Kvm => kvm::make,
            Self::Process => process::make,
        }
    }

    /// As the command line names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Process => "process",
        }
    }

    /// What its device state needs of a destination.
    pub fn platform(self) -> &'static str {
        match self {
            Self::Kvm => "x86_64/kvm",
            Self::Process => "x86_64/process",
        }
    }
}

/// The reference VMM of vmferry: a small VMM with a guest that verifies its own memory.
#[derive(Debug, Clone, Parser)]
#[command(name = "vmferry-refvm", version)]
#[expect(missing_docs, reason = "the help texts say it")]
pub struct Options {
    /// Name of the VM.
    #[arg(long, value_parser = vm_name)]
    pub vm: String,
    /// The daemon's VMM socket.
    #[arg(long)]
    pub daemon: PathBuf,
    /// Admin socket to make: one JSON object a line ("report", "status", "inject", "quit").
    #[arg(long)]
    pub admin: PathBuf,
    /// What runs the guest.
    #[arg(long, value_enum, default_value = "kvm")]
    pub accel: Accel,
    /// Wait to be the destination of a migration; memory, vCPUs and workload come with it.
    #[arg(long)]
    pub incoming: bool,
    /// Guest memory, e.g. 512M or 2G.
    #[arg(long, default_value = "512M", value_parser = bytes)]
    pub memory: u64,
    #[command(flatten)]
    pub memory_of: MemoryOf,
    /// Let the kernel back pages of 4 KiB by transparent huge pages; a destination's are collapsed after the last page.
    #[arg(long)]
    pub thp: bool,
    /// Split guest memory into so many regions.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    pub regions: u32,
    /// With --incoming: a userfaultfd for each region, not one for all.
    #[arg(long)]
    pub uffd_per_region: bool,
    /// Number of vCPUs.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub vcpus: u32,
    /// How the guest touches its memory.
    #[arg(long, value_parser = workload, default_value = "random")]
    pub workload: Workload,
    /// Share of touches that rewrite the page, percent.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub write_percent: u32,
    /// Seed of the guest's random numbers and of its pages' content.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Never tell the daemon of memory errors: they can then be found only by reading.
    #[arg(long)]
    pub mute_errors: bool,
    #[command(flatten)]
    pub faults: TestFaults,
}

/// What guest memory is made of here. With `--incoming` it is what `hello` says; what is absent is as on the source.
#[derive(Debug, Clone, Copy, Default, clap::Args, serde::Serialize)]
pub struct MemoryOf {
    /// What guest memory is made of [default: anonymous; with --incoming: as on the source].
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing: Option<Backing>,
    /// Pages of guest memory: 4K, 2M or 1G [default: 4K; with --incoming: as on the source].
    #[arg(long, value_parser = page_size)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub page_size: Option<u64>,
}

impl MemoryOf {
    /// Whether anything is said.
    pub fn is_own(&self) -> bool {
        self.backing.is_some() || self.page_size.is_some()
    }
}

impl From<MemoryOf> for MadeOf {
    fn from(of: MemoryOf) -> Self {
        Self { backing: of.backing.unwrap_or(Backing::Anonymous), page_size: of.page_size.unwrap_or(PAGE_SIZE) }
    }
}

/// Misbehaviour on demand, for tests of a daemon.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "For tests of a daemon")]
pub struct TestFaults {
    /// Answer FAILED to this request, once.
    #[arg(long, value_enum, value_name = "REQUEST")]
    fail_at: Option<Verb>,
    /// Exit (with 3) when this request comes.
    #[arg(long, value_enum, value_name = "REQUEST")]
    die_at: Option<Verb>,
    /// Never answer this request, nor carry it out.
    #[arg(long, value_enum, value_name = "REQUEST")]
    stall_at: Option<Verb>,
}

impl TestFaults {
    /// Whether to answer FAILED now; true once.
    pub fn fails_at(&mut self, verb: Verb) -> bool {
        self.fail_at.take_if(|at| *at == verb).is_some()
    }

    /// Whether to exit now.
    pub fn dies_at(&self, verb: Verb) -> bool {
        self.die_at == Some(verb)
    }

    /// Whether to leave the request unanswered.
    pub fn stalls_at(&self, verb: Verb) -> bool {
        self.stall_at == Some(verb)
    }
}

fn vm_name(text: &str) -> Result<String, String> {
    let rest = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let fits = text.len() <= 63 && text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.chars().all(rest);
    fits.then(|| text.into()).ok_or("must be [a-zA-Z0-9][a-zA-Z0-9._-]{0,62}".into())
}

fn bytes(text: &str) -> Result<u64, String> {
    let (number, shift) = match text.strip_suffix(['K', 'M', 'G']) {
        Some(number) if text.ends_with('K') => (number, 10),
        Some(number) if text.ends_with('M') => (number, 20),
        Some(number) => (number, 30),
        None => (text, 0),
    };
    let value: Option<u64> = number.parse().ok();
    let scaled = value.and_then(|value| value.checked_mul(1 << shift));
    scaled.ok_or_else(|| "must be a number of bytes, or end in K, M or G".into())
}

fn page_size(text: &str) -> Result<u64, String> {
    let found = bytes(text).ok().filter(|size| PAGE_SIZES.contains(size));
    found.ok_or_else(|| "must be 4K, 2M or 1G".into())
}

fn workload(text: &str) -> Result<Workload, String> {
    serde_json::from_value(text.into()).map_err(|_| "must be idle, random, sequential, hot or paced".into())
}

/// The program: returns when the VM has moved away or was told to quit.
pub fn main() -> ExitCode {
    let options = Options::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env();
    let filter = filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    let admin_socket = options.admin.clone();
    let code = match start(options) {
        Ok(code) => code,
        Err(text) => {
            eprintln!("vmferry-refvm: {text}");
            return ExitCode::from(2);
        }
    };
    // Gone already: somebody tidied up.
    let _ = std::fs::remove_file(admin_socket);
    // vCPU threads may wait on a page that never comes: the process ends without them.
    std::process::exit(code.into());
}

fn start(options: Options) -> Result<u8, String> {
    if options.thp && options.memory_of.page_size.is_some_and(|size| size != PAGE_SIZE) {
        return Err("--thp: transparent huge pages lie under pages of 4 KiB; leave out --thp or --page-size".into());
    }
    let listener = listen(&options.admin)?;
    let (events, inbox) = mpsc::channel();
    let (errors, guest_errors) = mpsc::channel();
    let (to_loop, to_admin, to_control) = (events.clone(), events.clone(), events.clone());
    let daemon = options.daemon.clone();
    thread("guest-errors", move || {
        guest_errors.into_iter().try_for_each(|error| to_loop.send(Event::GuestError(error))).unwrap_or(());
    })?;
    let booting = (!options.incoming).then(|| guest_of(&options)).transpose()?;
    let accel = options.accel.name();
    let mut vmm = Vmm::incoming(options, events, errors);
    if let Some((memory, config)) = booting {
        vmm.boot(memory, config).map_err(|error| {
            format!("the guest cannot run with --accel {accel}: {error}\nWithout /dev/kvm use --accel process.")
        })?;
    }
    thread("admin", move || admin::run(&listener, &to_admin))?;
    thread("control", move || control::run(&daemon, &to_control))?;
    Ok(vmm.run(&inbox))
}

fn guest_of(options: &Options) -> Result<(GuestMemory, GuestConfig), String> {
    let refused = |error: &dyn Display| format!("no guest memory: {error}\nAsk for less by --memory, or free some.");
    let made_of = MadeOf::from(options.memory_of);
    let specs = layout::split(options.memory, options.regions, made_of).map_err(|error| error.to_string())?;
    let transparent = if options.thp { Transparent::AtOnce } else { Transparent::Never };
    let memory = GuestMemory::with_transparent(&specs, transparent).map_err(|error| refused(&error))?;
    let config = GuestConfig {
        vcpus: options.vcpus,
        workload: options.workload,
        write_percent: options.write_percent,
        seed: options.seed,
    };
    Ok((memory, config))
}

fn listen(path: &Path) -> Result<UnixListener, String> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(format!("admin socket {}: {error}\nName another by --admin.", path.display()));
        }
        _ => {}
    }
    UnixListener::bind(path)
        .map_err(|error| format!("admin socket {}: {error}\nIts directory must exist and be writable.", path.display()))
}

fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), String> {
    let spawned = std::thread::Builder::new().name(name.into()).spawn(body);
    spawned.map(drop).map_err(|error| format!("thread {name}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Options::command().debug_assert();
        assert_eq!(bytes("512M"), Ok(512 << 20));
        assert_eq!(bytes("2G"), Ok(2 << 30));
        assert!(bytes("2T").is_err() && bytes("G").is_err() && bytes("99999999999999G").is_err());
        assert!(vm_name("web-1.a").is_ok() && vm_name("-x").is_err() && vm_name("").is_err());
    }

    #[test]
    fn memory_is_said_in_the_words_of_the_protocol() {
        let options = |more: &[&str]| {
            let needed = ["x", "--vm", "a", "--daemon", "d", "--admin", "s"];
            Options::try_parse_from(needed.iter().chain(more)).map(|options| options.memory_of)
        };
        let huge = options(&["--page-size", "2M", "--backing", "memfd"]).unwrap();
        let said = serde_json::json!({"backing": "memfd", "page_size": 2 << 20});
        assert_eq!(serde_json::to_value(huge).unwrap(), said);
        assert_eq!(MadeOf::from(huge), MadeOf { backing: Backing::Memfd, page_size: 2 << 20 });
        let none = options(&[]).unwrap();
        assert!(!none.is_own() && serde_json::to_value(none).unwrap() == serde_json::json!({}));
        assert_eq!(MadeOf::from(none), Backing::Anonymous.into());
        assert!(options(&["--page-size", "8K"]).is_err() && options(&["--page-size", "1G"]).is_ok());
    }

    #[test]
    fn a_failure_on_demand_happens_once() {
        let arguments = ["x", "--vm", "a", "--daemon", "d", "--admin", "s", "--fail-at", "save_state"];
        let mut options = Options::parse_from(arguments);
        assert!(!options.faults.fails_at(Verb::Stop));
        assert!(options.faults.fails_at(Verb::SaveState));
        assert!(!options.faults.fails_at(Verb::SaveState));
    }
}
