//! Keeps the host's CPUs out of their idle states while a guest faults. A fault wakes several CPUs, and each wake-up out of an
//! idle state takes longer than the rest of the fault.
//!
//! The means is a PM QoS request: idle CPUs poll while a process holds /dev/cpu_dma_latency open with 0 in it
//! (Documentation/power/pm_qos_interface.rst, Linux). It ends with the process in any case.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Thread;
use std::time::Duration;

const LATENCY_FILE: &str = "/dev/cpu_dma_latency";
/// CPUs become idle between one and two of these after the last request for a page.
const IDLE_AFTER: Duration = Duration::from_millis(20);

/// The request, which ends when it is dropped. A thread of its own makes it and ends it, because both wake every CPU.
#[derive(Debug)]
pub struct CpuLatencyRequest {
    state: Arc<RequestState>,
    /// `None`: not wanted, or not possible.
    holder: Option<Thread>,
}

#[derive(Debug, Default)]
struct RequestState {
    /// Since the last check by the thread.
    renewed: AtomicBool,
    ended: AtomicBool,
}

impl CpuLatencyRequest {
    /// Does nothing unless `wanted`.
    pub fn new(wanted: bool) -> Self {
        Self::by(wanted.then_some(Path::new(LATENCY_FILE)))
    }

    fn by(file: Option<&Path>) -> Self {
        let state = Arc::<RequestState>::default();
        let holder = file.and_then(|file| {
            let (file, state) = (file.to_owned(), state.clone());
            let holder = std::thread::Builder::new().name("awake".into()).spawn(move || keep(&file, &state));
            holder.map(|holder| holder.thread().clone()).inspect_err(warn_not_held).ok()
        });
        Self { state, holder }
    }

    /// A vCPU waits for a page: keeps the request, or makes it.
    pub fn renew(&self) {
        if let Some(holder) = &self.holder
            && !self.state.renewed.swap(true, Ordering::Relaxed)
        {
            holder.unpark();
        }
    }
}

impl Drop for CpuLatencyRequest {
    fn drop(&mut self) {
        self.state.ended.store(true, Ordering::Relaxed);
        if let Some(holder) = &self.holder {
            holder.unpark();
        }
    }
}

fn keep(file: &Path, state: &RequestState) {
    while !state.ended.load(Ordering::Relaxed) {
        if !state.renewed.load(Ordering::Relaxed) {
            std::thread::park();
            continue;
        }
        let request = match hold(file) {
            Ok(request) => request,
            Err(error) => return warn_not_held(&error),
        };
        while state.renewed.swap(false, Ordering::Relaxed) && !state.ended.load(Ordering::Relaxed) {
            std::thread::sleep(IDLE_AFTER);
        }
        drop(request);
    }
}

fn hold(file: &Path) -> io::Result<File> {
    let mut request = OpenOptions::new().write(true).open(file)?;
    request.write_all(&0i32.to_ne_bytes())?;
    Ok(request)
}

fn warn_not_held(error: &io::Error) {
    tracing::info!(%error, "processors.not_kept_awake");
}

#[cfg(test)]
mod tests;
