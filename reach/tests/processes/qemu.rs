//! A stock QEMU that waits as a destination: its memory is emptied and registered, and a touch is served by hand.

use std::io::{BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use vmferry_patience::patient;
use vmferry_reach::proto::reach_reply::Outcome;
use vmferry_reach::proto::reach_request::Operation;
use vmferry_reach::proto::{
    CloseUserfaultfdRequest, CreateUserfaultfdRequest, DescribeRequest, EmptyRequest, HvaRange, MappingKind,
    ReachErrorCode, SeccompPolicy,
};

use crate::rig::{Named, filtered_with_the_rights_of_the_unit, is_root, reach, reach_by, rules};
use crate::served::Served;

const PROGRAM: &str = "qemu-system-x86_64";
/// As libvirt starts it.
const SANDBOX: [&str; 2] = ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"];
const MEMORY: u64 = 64 << 20;
const TOUCHED: u64 = 0x20_0000;
const FEATURES: [&str; 4] =
    ["UFFD_FEATURE_MISSING_SHMEM", "UFFD_FEATURE_EVENT_REMOVE", "UFFD_FEATURE_THREAD_ID", "UFFD_FEATURE_POISON"];

/// A QEMU and its monitor; killed when dropped.
struct Qemu {
    child: Child,
    monitor: BufReader<UnixStream>,
    _directory: tempfile::TempDir,
}

impl Qemu {
    fn start(mut command: Command, accelerator: &str, options: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let socket = directory.path().join("qmp");
        let machine =
            ["-nodefaults", "-display", "none", "-m", "64", "-accel", accelerator, "-S", "-incoming", "defer"];
        let qmp = format!("unix:{},server=on,wait=off", socket.display());
        let child = command.args(machine).args(options).args(["-qmp", &qmp]).stdin(Stdio::null()).spawn();
        let mut qemu = Self { child: child.unwrap(), monitor: connect(&socket), _directory: directory };
        qemu.line();
        qemu.ask("qmp_capabilities", &json!({}));
        qemu
    }

    fn pid(&self) -> i32 {
        self.child.id().try_into().unwrap()
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.monitor.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn send(&mut self, command: &str, arguments: &Value, file: Option<&std::fs::File>) {
        let bytes = format!("{}\n", json!({"execute": command, "arguments": arguments})).into_bytes();
        let Some(file) = file else { return self.monitor.get_mut().write_all(&bytes).unwrap() };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors = [file.as_fd()];
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
        sendmsg(self.monitor.get_ref(), &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::empty()).unwrap();
    }

    fn answer(&mut self) -> Value {
        loop {
            let line = self.line();
            if line.get("event").is_none() {
                return line.get("return").unwrap_or_else(|| panic!("{line}")).clone();
            }
        }
    }

    fn ask(&mut self, command: &str, arguments: &Value) -> Value {
        self.send(command, arguments, None);
        self.answer()
    }

    fn human(&mut self, line: &str) -> String {
        self.ask("human-monitor-command", &json!({"command-line": line})).as_str().unwrap().to_owned()
    }

    /// Its main memory.
    fn range(&mut self) -> HvaRange {
        let said = self.human("gpa2hva 0");
        let address = said.trim().rsplit("0x").next().unwrap();
        HvaRange { start: u64::from_str_radix(address, 16).unwrap(), size: MEMORY }
    }

    fn vcpus(&mut self) -> Vec<i32> {
        let vcpus = self.ask("query-cpus-fast", &json!({}));
        vcpus.as_array().unwrap().iter().map(|vcpu| vcpu["thread-id"].as_i64().unwrap().try_into().unwrap()).collect()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn connect(socket: &PathBuf) -> BufReader<UnixStream> {
    let began = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return BufReader::new(stream),
            Err(error) => assert!(began.elapsed() < patient(60.0), "{error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Whether QEMU can be adopted here; says why not.
fn can_run(test: &str) -> bool {
    let installed = Command::new(PROGRAM).arg("--version").stdout(Stdio::null()).status().is_ok();
    if !installed {
        println!("{test}: skipped, {PROGRAM} is not installed");
    }
    let device = std::fs::File::open("/dev/userfaultfd").is_ok();
    if !device {
        println!("{test}: skipped, /dev/userfaultfd cannot be opened");
    }
    installed && device && is_root(test)
}

fn accelerator() -> &'static str {
    if std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok() { "kvm" } else { "tcg" }
}

/// Hands the device over, makes a userfaultfd, serves one touch, and closes it. Returns the kind of memory.
fn adopt(mut qemu: Qemu) -> MappingKind {
    let device = std::fs::OpenOptions::new().read(true).write(true).open("/dev/userfaultfd").unwrap();
    qemu.send("add-fd", &json!({"opaque": "userfaultfd"}), Some(&device));
    let added = qemu.answer();
    let number: u32 = added["fd"].as_u64().unwrap().try_into().unwrap();
    let (range, vcpus) = (qemu.range(), qemu.vcpus());
    let named = Named::of(qemu.pid());
    let injection = || rules(SeccompPolicy::Trust, &vcpus);
    let ranges = vec![range];

    let describe = DescribeRequest { ranges: ranges.clone(), ..Default::default() };
    let described = reach_by(filtered_with_the_rights_of_the_unit(), &named, Operation::Describe(describe));
    let Some(Outcome::Describe(described)) = described.reply.outcome else { panic!("{described:?}") };
    let empty = EmptyRequest { ranges: ranges.clone(), discard: true, injection: injection() };
    reach_by(filtered_with_the_rights_of_the_unit(), &named, Operation::Empty(empty)).assert_done();
    let features = FEATURES.map(String::from).to_vec();
    let create = CreateUserfaultfdRequest {
        ranges,
        features,
        device: Some(number),
        injection: injection(),
        ..Default::default()
    };
    let made = reach_by(filtered_with_the_rights_of_the_unit(), &named, Operation::CreateUserfaultfd(create));
    made.assert_done();
    assert!(made.reply.calls.iter().all(|call| !vcpus.contains(&call.thread.cast_signed())), "{:?}", made.reply.calls);
    qemu.ask("remove-fd", &json!({"fdset-id": added["fdset-id"]}));

    let served = Served(&made.descriptors[0]);
    qemu.send("human-monitor-command", &json!({"command-line": format!("xp /1xb {TOUCHED:#x}")}), None);
    assert_eq!(served.fault(), range.start + TOUCHED);
    served.copy(range.start + TOUCHED, 0x5a);
    assert!(qemu.answer().as_str().unwrap().contains("0x5a"), "the page that was served is read");

    let Some(Outcome::CreateUserfaultfd(reply)) = made.reply.outcome else { panic!() };
    let close = CloseUserfaultfdRequest { descriptor: reply.descriptor_in_process.unwrap(), injection: injection() };
    reach(&named, Operation::CloseUserfaultfd(close)).assert_done();
    assert_eq!(qemu.ask("query-status", &json!({}))["status"], "inmigrate");
    described.mappings[0].kind()
}

#[test]
fn a_qemu_of_root_is_adopted() {
    if can_run("a_qemu_of_root_is_adopted") {
        let qemu = Qemu::start(Command::new(PROGRAM), accelerator(), &SANDBOX);
        assert_eq!(adopt(qemu), MappingKind::Anonymous);
    }
}

#[test]
fn a_qemu_of_a_user_without_rights_is_adopted() {
    if !can_run("a_qemu_of_a_user_without_rights_is_adopted") {
        return;
    }
    let memfd = ["-object", "memory-backend-memfd,id=m,size=64M,share=on", "-machine", "pc,memory-backend=m"];
    let full =
        ["-object", "memory-backend-memfd,id=m,size=64M,share=on,prealloc=on", "-machine", "pc,memory-backend=m"];
    let anonymous_full = ["-object", "memory-backend-ram,id=m,size=64M,prealloc=on", "-machine", "pc,memory-backend=m"];
    for (memory, kind) in
        [(memfd, MappingKind::Memfd), (full, MappingKind::Memfd), (anonymous_full, MappingKind::Anonymous)]
    {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", PROGRAM]);
        assert_eq!(adopt(Qemu::start(command, "tcg", &[memory.as_slice(), &SANDBOX].concat())), kind, "{memory:?}");
    }
}

#[test]
fn a_qemu_that_gave_up_root_is_adopted() {
    if can_run("a_qemu_that_gave_up_root_is_adopted") {
        // A sandbox that denies privileges would deny this.
        let qemu = Qemu::start(Command::new(PROGRAM), accelerator(), &["-runas", "nobody"]);
        let named = Named::of(qemu.pid());
        let plain = CreateUserfaultfdRequest { injection: rules(SeccompPolicy::Trust, &[]), ..Default::default() };
        let refused = reach(&named, Operation::CreateUserfaultfd(plain));
        assert!(refused.assert_error(ReachErrorCode::Call).message.contains("/dev/userfaultfd"));
        adopt(qemu);
    }
}
