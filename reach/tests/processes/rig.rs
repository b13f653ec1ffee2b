//! Victims, and the program as a caller runs it.

use std::io::{BufRead, BufReader, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::LazyLock;

use prost::Message;
use rustix::io::FdFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use vmferry_reach::proto::reach_reply::Outcome;
use vmferry_reach::proto::reach_request::Operation;
use vmferry_reach::proto::{
    Injection, ProbeRequest, ReachError, ReachErrorCode, ReachProcess, ReachReply, ReachRequest, SeccompPolicy,
};

/// The victim, linked dynamically and statically; built once. Without a static C library there is only the first.
static VICTIMS: LazyLock<Vec<PathBuf>> = LazyLock::new(|| {
    let dynamic = build("victim", &[]).expect("gcc builds the victim");
    let linked_statically = build("victim-static", &["-static"]);
    if linked_statically.is_none() {
        println!("static victims: skipped, gcc cannot link statically here");
    }
    [Some(dynamic), linked_statically].into_iter().flatten().collect()
});

fn build(name: &str, flags: &[&str]) -> Option<PathBuf> {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/processes/victim.c");
    let built = Command::new("gcc").args(["-O2", "-pthread"]).args(flags).arg("-o").arg(&program).arg(source).status();
    built.unwrap().success().then_some(program)
}

/// Each way in which victims are linked.
pub fn linked() -> Vec<&'static Path> {
    VICTIMS.iter().map(PathBuf::as_path).collect()
}

/// As `deploy/systemd/vmferryd.service` grants them.
const OF_THE_UNIT: &str = "-all,+sys_ptrace,+dac_override,+sys_nice";

/// A victim that runs; killed when dropped.
pub struct Victim {
    pub child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    /// Lines before "ready".
    pub announced: Vec<String>,
}

impl Victim {
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_program(&VICTIMS[0], arguments)
    }

    pub fn start_program(program: &Path, arguments: &[&str]) -> Self {
        Self::start_by(Command::new(program).args(arguments))
    }

    /// As a user without rights.
    pub fn start_as_nobody(arguments: &[&str]) -> Self {
        Self::start_by(Self::as_nobody().args(arguments))
    }

    /// The same, with an open file that it inherits.
    pub fn start_as_nobody_with(file: &std::fs::File, arguments: &[&str]) -> Self {
        let inherited = file.try_clone().unwrap();
        rustix::io::fcntl_setfd(&inherited, FdFlags::empty()).unwrap();
        Self::start_by(Self::as_nobody().args(arguments))
    }

    fn as_nobody() -> Command {
        as_nobody(&VICTIMS[0])
    }

    fn start_by(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let input = child.stdin.take();
        let mut victim = Self { output: BufReader::new(child.stdout.take().unwrap()), child, input, announced: vec![] };
        loop {
            match victim.line().as_str() {
                "ready" => return victim,
                "" => panic!("the victim ended: {:?}", victim.announced),
                line => victim.announced.push(line.into()),
            }
        }
    }

    pub fn pid(&self) -> i32 {
        self.child.id().try_into().unwrap()
    }

    /// The number of a descriptor that it has open on a path.
    pub fn descriptor(&self, path: &str) -> u32 {
        let entries = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap();
        let mut entries = entries.map(|entry| entry.unwrap().path());
        let found = entries.find(|entry| std::fs::read_link(entry).unwrap().to_str() == Some(path)).unwrap();
        found.file_name().unwrap().to_str().unwrap().parse().unwrap()
    }

    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().into()
    }

    /// Gives it a line on standard input.
    pub fn say(&mut self, line: &str) {
        writeln!(self.input.as_ref().unwrap(), "{line}").unwrap();
    }

    pub fn ask(&mut self, line: &str) -> String {
        self.say(line);
        self.line()
    }

    /// Waits until it sleeps in a system call other than those of its way there.
    pub fn until_asleep(self) -> Self {
        self.until_asleep_in(&["running", "-1"])
    }

    fn until_asleep_in(self, not: &[&str]) -> Self {
        for _ in 0..2000 {
            let call = std::fs::read_to_string(format!("/proc/{}/syscall", self.pid())).unwrap();
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
            let asleep = stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('S'));
            if asleep && !not.contains(&call.split_whitespace().next().unwrap()) {
                return self;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        panic!("the victim does not sleep");
    }

    /// Ends its wait, and returns its last line: "ok MILLISECONDS" if it noticed nothing.
    pub fn finish(mut self) -> String {
        drop(self.input.take().map(|mut input| input.write_all(b"x")));
        let mut rest = String::new();
        self.output.read_to_string(&mut rest).unwrap();
        let status = self.child.wait().unwrap();
        format!("{}{}", rest.trim_end(), if status.success() { String::new() } else { format!(" [{status}]") })
    }

    pub fn assert_undisturbed(self) -> f64 {
        let said = self.finish();
        let took = said.strip_prefix("ok ").and_then(|took| took.parse().ok());
        took.unwrap_or_else(|| panic!("the victim noticed: {said}"))
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a program as a user without rights, from a directory that this user cannot enter.
pub fn as_nobody(program: &Path) -> Command {
    let program = std::fs::File::open(program).unwrap();
    rustix::io::fcntl_setfd(&program, FdFlags::empty()).unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    // Open until the test ends, as the command may be started at any time.
    command.arg(format!("/proc/self/fd/{}", std::os::fd::IntoRawFd::into_raw_fd(program)));
    command
}

/// The program as the daemon's service runs it: few capabilities, and a seccomp filter of its own. The kernel neither
/// suspends nor shows the filters of others to a process that has one.
pub fn filtered_with_the_rights_of_the_unit() -> Command {
    let mut command = Command::new(&VICTIMS[0]);
    command.args(["run", "setpriv", "--bounding-set", OF_THE_UNIT]).arg(env!("CARGO_BIN_EXE_reach-under-test"));
    command
}

/// The program while it works; killed when dropped.
pub struct InBackground(pub Child);

impl InBackground {
    pub fn start(named: &Named, operation: Operation) -> Self {
        let request =
            ReachRequest { process: Some(named.inheritable()), descriptor_socket: 0, operation: Some(operation) };
        let mut program = Command::new(env!("CARGO_BIN_EXE_reach-under-test"));
        let mut child = program.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(&request.encode_to_vec()).unwrap();
        Self(child)
    }

    pub fn send(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }
}

impl Drop for InBackground {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A process as a caller names it.
pub struct Named {
    pub pid: i32,
    pub start_time: u64,
    pub pidfd: OwnedFd,
}

impl Named {
    pub fn of(pid: i32) -> Self {
        let pidfd = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();
        Self { pid, start_time: start_time(pid), pidfd }
    }

    pub fn of_victim(victim: &Victim) -> Self {
        Self::of(victim.pid())
    }

    /// For a request; a child inherits the pidfd then.
    pub fn inheritable(&self) -> ReachProcess {
        rustix::io::fcntl_setfd(&self.pidfd, FdFlags::empty()).unwrap();
        ReachProcess {
            pid: self.pid.cast_unsigned(),
            start_time: self.start_time,
            pidfd: self.pidfd.as_raw_fd().cast_unsigned(),
        }
    }

    pub fn kill(&self) {
        kill_process(Pid::from_raw(self.pid).unwrap(), Signal::KILL).unwrap();
    }
}

pub fn start_time(pid: i32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap().parse().unwrap()
}

/// The program's reply, descriptors and log.
#[derive(Debug)]
pub struct Answer {
    pub reply: ReachReply,
    pub descriptors: Vec<OwnedFd>,
    pub log: String,
    pub code: Option<i32>,
}

impl Answer {
    pub fn error(&self) -> Option<(ReachErrorCode, &ReachError)> {
        match &self.reply.outcome {
            Some(Outcome::Error(error)) => Some((error.code(), error)),
            _ => None,
        }
    }

    pub fn assert_done(&self) {
        assert_eq!((self.error(), self.code), (None, Some(0)), "{}", self.log);
    }

    pub fn assert_error(&self, code: ReachErrorCode) -> &ReachError {
        let (actual, error) = self.error().unwrap_or_else(|| panic!("done: {:?}", self.reply));
        assert_eq!((actual, self.code), (code, Some(1)), "{}", error.message);
        error
    }
}

pub fn reach(process: &Named, operation: Operation) -> Answer {
    reach_by(Command::new(env!("CARGO_BIN_EXE_reach-under-test")), process, operation)
}

pub fn reach_by(command: Command, process: &Named, operation: Operation) -> Answer {
    let (ours, theirs) = UnixStream::pair().unwrap();
    rustix::io::fcntl_setfd(&theirs, FdFlags::empty()).unwrap();
    let request = ReachRequest {
        process: Some(process.inheritable()),
        descriptor_socket: theirs.as_raw_fd().cast_unsigned(),
        operation: Some(operation),
    };
    let mut answer = run(command, &request);
    drop(theirs);
    // Without descriptors there is no message, and its end would not show: other children may have inherited `theirs`.
    if answer.reply.descriptors > 0 {
        answer.descriptors = receive(&ours);
    }
    assert_eq!(answer.descriptors.len(), answer.reply.descriptors as usize, "{}", answer.log);
    answer
}

/// Runs the program with a request as it is.
pub fn run(mut command: Command, request: &ReachRequest) -> Answer {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&request.encode_to_vec()).unwrap();
    let output = child.wait_with_output().unwrap();
    Answer {
        reply: ReachReply::decode(output.stdout.as_slice()).unwrap(),
        descriptors: Vec::new(),
        log: String::from_utf8(output.stderr).unwrap(),
        code: output.status.code(),
    }
}

fn receive(socket: &UnixStream) -> Vec<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
    ancillary
        .drain()
        .flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect(),
            _ => Vec::new(),
        })
        .collect()
}

pub fn rules(seccomp: SeccompPolicy, excluded: &[i32]) -> Option<Injection> {
    let excluded_threads = excluded.iter().map(|thread| thread.cast_unsigned()).collect();
    Some(Injection { excluded_threads, seccomp: seccomp.into() })
}

/// A call that changes nothing, run by a thread of the victim.
pub fn probe(victim: &Victim) -> Answer {
    reach(&Named::of_victim(victim), probing(SeccompPolicy::Unspecified))
}

pub fn probing(seccomp: SeccompPolicy) -> Operation {
    Operation::Probe(ProbeRequest { injection: rules(seccomp, &[]) })
}

/// Whether the test runs as root; otherwise it says that it is skipped.
pub fn is_root(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("{test}: skipped, needs root");
    }
    root
}
