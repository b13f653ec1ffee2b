//! Start of the program.

use std::fmt::Display;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc;

use clap::Parser;

use crate::layout::{self, MadeOf, PAGE_SIZE};
use crate::machine::GuestConfig;
use crate::memory::{GuestMemory, Transparent};
use crate::options::Options;
use crate::vmm::{Event, Vmm};
use crate::{admin, control, pc, sigbus};

/// The program: returns when the VM has moved away or was told to quit.
pub fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|word| word == pc::VERB) {
        return pc::main();
    }
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
    // The file is gone already.
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
    let (to_loop, to_admin, to_control, early) = (events.clone(), events.clone(), events.clone(), events.clone());
    // The control loop ends only with the process.
    let reported = sigbus::report_early_errors(move |hva| drop(early.send(Event::FoundEarly { hva })));
    reported.map_err(|error| format!("SIGBUS handler: {error}"))?;
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
