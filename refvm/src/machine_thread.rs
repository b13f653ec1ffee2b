//! The one thread that commands a machine: operations that may block (stop, save, make a memory error) block here.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;

use crate::machine::{GuestConfig, GuestMemoryError, Machine, MachineError, MakeMachine};
use crate::memory::GuestMemory;

/// The state that the thread owns.
pub struct Commanded {
    machine: Box<dyn Machine>,
    running: bool,
}

impl Commanded {
    /// The machine, to be booted, saved, loaded or told of memory errors.
    pub fn machine(&mut self) -> &mut dyn Machine {
        &mut *self.machine
    }

    /// Runs the vCPUs, if they do not.
    ///
    /// # Errors
    /// As [`Machine::run`].
    pub fn run(&mut self) -> Result<(), MachineError> {
        if !self.running {
            self.machine.run()?;
            self.running = true;
        }
        Ok(())
    }

    /// Stops the vCPUs, if they run.
    ///
    /// # Errors
    /// As [`Machine::stop`].
    pub fn stop(&mut self) -> Result<(), MachineError> {
        if self.running {
            self.machine.stop()?;
            self.running = false;
        }
        Ok(())
    }

    /// Does something while the vCPUs are stopped; they run again after it if they ran before.
    ///
    /// # Errors
    /// As [`Machine::stop`] and [`Machine::run`].
    pub fn paused<T>(&mut self, act: impl FnOnce() -> T) -> Result<T, MachineError> {
        let ran = self.running;
        self.stop()?;
        let done = act();
        if ran {
            self.run()?;
        }
        Ok(done)
    }
}

type Job = Box<dyn FnOnce(&mut Commanded) + Send>;

/// The thread. Dropping it stops the machine and waits for that, as far as the kernel lets vCPU threads that wait on a
/// page fault be interrupted.
#[derive(Debug)]
pub struct MachineThread {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl MachineThread {
    /// Makes a machine over `memory`, which the thread keeps mapped.
    ///
    /// # Errors
    /// As `make`.
    pub fn spawn(
        make: MakeMachine,
        memory: Arc<GuestMemory>,
        config: GuestConfig,
        errors: Sender<GuestMemoryError>,
    ) -> Result<Self, MachineError> {
        let (jobs, todo) = mpsc::channel::<Job>();
        let (made, result) = mpsc::channel();
        let body = move || {
            let mut commanded = match make(memory.ram(), config, errors) {
                Ok(machine) => Commanded { machine, running: false },
                Err(error) => return drop(made.send(Err(error))),
            };
            drop(made.send(Ok(())));
            todo.into_iter().for_each(|job| job(&mut commanded));
            if let Err(error) = commanded.stop() {
                tracing::error!(%error, "machine.stop_failed");
            }
            drop(commanded);
            drop(memory);
        };
        let host = |source| MachineError::Host { what: "machine thread", source };
        let thread = std::thread::Builder::new().name("machine".into()).spawn(body).map_err(host)?;
        result.recv().unwrap_or_else(|_| Err(host(io::Error::other("ended while the machine was made"))))?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Has the thread do something after its present work. A job tells of its end by itself.
    pub fn command(&self, job: impl FnOnce(&mut Commanded) + Send + 'static) {
        // The thread ends only after this sender is dropped, or by a panic, which its message has told already.
        if self.jobs.as_ref().is_some_and(|jobs| jobs.send(Box::new(job)).is_err()) {
            tracing::error!("machine.thread_gone");
        }
    }
}

impl Drop for MachineThread {
    fn drop(&mut self) {
        self.jobs = None;
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("machine.thread_panicked");
        }
    }
}
