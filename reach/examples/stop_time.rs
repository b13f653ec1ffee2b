//! Measures how long a thread is stopped by one injected call, and how long a whole request takes:
//! `cargo run --release --package vmferry-reach --example stop_time`.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use prost::Message;
use rustix::io::FdFlags;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use vmferry_reach::identity::Process;
use vmferry_reach::inject::{Call, Injector};
use vmferry_reach::proto::reach_request::Operation;
use vmferry_reach::proto::{Injection, ProbeRequest, ReachProcess, ReachRequest, SeccompPolicy};

const CALLS: usize = 200;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let program = std::env::args().nth(1);
    println!("{:<28} {:>6} {:>6} {:>6}   microseconds, {CALLS} calls each", "", "p50", "p99", "max");
    for (state, command) in [("in read", vec!["cat"]), ("in nanosleep", vec!["sleep", "600"]), ("running", vec!["yes"])]
    {
        let mut victim = Command::new(command[0])
            .args(&command[1..])
            .stdin(Stdio::piped())
            .stdout(if state == "running" { Stdio::null() } else { Stdio::piped() })
            .spawn()?;
        let measured = stops(&victim).and_then(|stops| Ok((stops, requests(&victim, program.as_deref())?)));
        victim.kill()?;
        victim.wait()?;
        let (stops, requests) = measured?;
        print(&format!("thread stopped, {state}"), stops);
        print(&format!("whole request, {state}"), requests);
    }
    Ok(())
}

fn start_time(pid: u32) -> Result<u64, Failure> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    Ok(fields.split_whitespace().nth(19).unwrap_or_default().parse()?)
}

fn stops(victim: &Child) -> Result<Vec<u64>, Failure> {
    let pid = Pid::from_child(victim);
    let start_time = start_time(victim.id())?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let process = Process::verify(pid.as_raw_nonzero().get(), start_time, pidfd)?;
    let mut injector = Injector::new(&process, Some(&rules()));
    for _ in 0..CALLS {
        injector.run(&Call::getpid())?;
    }
    Ok(injector.calls.iter().map(|call| call.stopped_us).collect())
}

/// From the start of the program to its exit; nothing without a program.
fn requests(victim: &Child, program: Option<&str>) -> Result<Vec<u64>, Failure> {
    let Some(program) = program else { return Ok(Vec::new()) };
    let pidfd = pidfd_open(Pid::from_child(victim), PidfdFlags::empty())?;
    rustix::io::fcntl_setfd(&pidfd, FdFlags::empty())?;
    let process = ReachProcess {
        pid: victim.id(),
        start_time: start_time(victim.id())?,
        pidfd: pidfd.as_raw_fd().cast_unsigned(),
    };
    let operation = Some(Operation::Probe(ProbeRequest { injection: Some(rules()) }));
    let request = ReachRequest { process: Some(process), descriptor_socket: 0, operation }.encode_to_vec();
    let mut took = Vec::new();
    for _ in 0..CALLS {
        let began = Instant::now();
        let mut child =
            Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        if let Some(mut input) = child.stdin.take() {
            input.write_all(&request)?;
        }
        child.wait_with_output()?;
        took.push(began.elapsed().as_micros() as u64);
    }
    Ok(took)
}

fn rules() -> Injection {
    Injection { excluded_threads: Vec::new(), seccomp: SeccompPolicy::Unspecified.into() }
}

fn print(what: &str, mut microseconds: Vec<u64>) {
    microseconds.sort_unstable();
    if let (Some(p50), Some(p99), Some(max)) =
        (microseconds.get(CALLS / 2), microseconds.get(CALLS * 99 / 100), microseconds.last())
    {
        println!("{what:<28} {p50:>6} {p99:>6} {max:>6}");
    }
}
