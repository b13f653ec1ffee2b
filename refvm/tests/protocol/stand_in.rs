//! Stand-ins for the daemon and the destination's pager, with nothing of the crate but its frame codec.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmferry_patience::patient;
use vmferry_refvm::protocol::frame::{CONTROL_LIMIT, Decoder, encode};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Generous: only a defect lets it pass.
pub static DEADLINE: LazyLock<Duration> = LazyLock::new(|| patient(60.0));

/// A VMM process and the daemon's end of its control connection.
pub struct Vmm {
    pub child: Child,
    pub hello: Value,
    admin: PathBuf,
    listener: UnixListener,
    stream: UnixStream,
    decoder: Decoder,
    next_id: u64,
    /// `memory_error` messages that came so far.
    pub told: Vec<Value>,
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn accept(listener: &UnixListener) -> (UnixStream, Decoder) {
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(*DEADLINE)).unwrap();
    (stream, Decoder::new(CONTROL_LIMIT))
}

impl Vmm {
    /// Starts a VMM of threads and answers its `hello`.
    pub fn start(dir: &Path, name: &str, arguments: &[&str]) -> Self {
        Self::start_with("process", dir, name, arguments)
    }

    /// Starts a VMM with this accelerator and answers its `hello`.
    pub fn start_with(accel: &str, dir: &Path, name: &str, arguments: &[&str]) -> Self {
        let (daemon, admin) = (dir.join(format!("{name}.vmm.sock")), dir.join(format!("{name}.admin.sock")));
        let listener = UnixListener::bind(&daemon).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_refvm-under-test"))
            .args(["--vm", "web-1", "--accel", accel, "--daemon"])
            .arg(&daemon)
            .arg("--admin")
            .arg(&admin)
            .args(arguments)
            .spawn()
            .unwrap();
        let (stream, decoder) = accept(&listener);
        let mut vmm =
            Self { child, hello: Value::Null, admin, listener, stream, decoder, next_id: 1, told: Vec::new() };
        vmm.welcome();
        vmm
    }

    fn welcome(&mut self) {
        self.hello = self.receive().unwrap();
        assert_eq!(self.hello["type"], "hello");
        self.send(&json!({"type": "welcome", "version": 1, "later": "ignored"}));
    }

    /// Takes the connection that the VMM makes anew.
    pub fn accept_again(&mut self) {
        (self.stream, self.decoder) = accept(&self.listener);
        self.welcome();
    }

    pub fn send(&mut self, message: &Value) {
        self.stream.write_all(&encode(message, CONTROL_LIMIT).unwrap()).unwrap();
    }

    pub fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// The next message; `None` when the VMM ends the connection.
    pub fn receive(&mut self) -> Option<Value> {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return Some(serde_json::from_slice(&frame).unwrap());
            }
            let mut buffer = [0; 65536];
            match self.stream.read(&mut buffer) {
                Ok(0) => return None,
                Ok(count) => self.decoder.push(&buffer[..count]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("no message within {:?}: {error}", *DEADLINE),
            }
        }
    }

    /// Asks and returns the answer, keeping memory errors that come before it.
    pub fn ask(&mut self, mut request: Value) -> Value {
        let id = self.next_id;
        self.next_id += 1;
        request["id"] = id.into();
        self.send(&request);
        loop {
            let message = self.receive().expect("an answer");
            if message["type"] == "memory_error" {
                self.told.push(message);
            } else {
                assert_eq!(message["id"], id, "{message}");
                return message;
            }
        }
    }

    /// Asks what must be answered by a reply.
    pub fn done(&mut self, request: Value) -> Value {
        let answer = self.ask(request.clone());
        assert_eq!(answer["type"], "reply", "{request}: {answer}");
        answer
    }

    pub fn admin(&self, command: &Value) -> Value {
        let mut stream = UnixStream::connect(&self.admin).unwrap();
        stream.set_read_timeout(Some(*DEADLINE)).unwrap();
        writeln!(stream, "{command}").unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    pub fn report(&self) -> Value {
        let report = self.admin(&json!({"cmd": "report"}));
        assert_eq!(report["ok"], true, "{report}");
        report
    }

    /// Waits until the guest's report is as asked.
    pub fn report_until(&self, what: &str, reached: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + *DEADLINE;
        loop {
            let report = self.report();
            if reached(&report) {
                return report;
            }
            assert!(Instant::now() < end, "never {what}: {report}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Receives memory errors until there are so many.
    pub fn told_until(&mut self, count: usize) {
        while self.told.len() < count {
            let message = self.receive().expect("a memory error");
            assert_eq!(message["type"], "memory_error", "{message}");
            self.told.push(message);
        }
    }
}

/// The regions of a `hello`, as `prepare` names them.
pub fn layout(hello: &Value) -> Value {
    let region =
        |r: &Value| json!({"gpa": r["gpa"], "size": r["size"], "page_size": r["page_size"], "backing": r["backing"]});
    hello["regions"].as_array().unwrap().iter().map(region).collect()
}

/// The memory message of a VMM.
pub fn take_memory(stream: &UnixStream) -> (Value, Vec<OwnedFd>) {
    let mut buffer = vec![0u8; 65536];
    let mut fds = [-1 as RawFd; 64];
    let mut vectors = [libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }];
    // SAFETY: the vector describes `buffer`, which outlives the call.
    let (bytes, count) = unsafe { stream.recv_with_fds(&mut vectors, &mut fds) }.unwrap();
    // SAFETY: the descriptors were just received and are owned by nobody else.
    let fds = fds[..count].iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }).collect();
    (serde_json::from_slice(&buffer[..bytes]).unwrap(), fds)
}

pub fn send_frame(mut stream: &UnixStream, message: &Value) {
    stream.write_all(&encode(message, 65536).unwrap()).unwrap();
}

/// Serves a destination's faults out of the source's memory, page by page, in the order of touch; pages that the source
/// cannot read are poison. Ends when the VMM's connection or the test ends.
pub fn serve_pages(listener: UnixListener, source_pid: u32, source_regions: Value) {
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let (message, fds) = take_memory(&stream);
        assert_eq!((&message["role"], &message["uffd"]), (&json!("destination"), &json!(0)));
        send_frame(&stream, &json!({"type": "attached", "version": 1}));
        let here = message["regions"].as_array().unwrap().clone();
        let there = source_regions.as_array().unwrap().clone();
        while let Some(fault) = next_fault(&fds[0], &stream) {
            let number = |value: &Value, name: &str| value[name].as_u64().unwrap();
            let at = here.iter().position(|r| {
                let start = number(r, "base_host_virt_addr");
                (start..start + number(r, "size")).contains(&fault)
            });
            let region = at.expect("a fault in guest memory");
            let offset = fault - number(&here[region], "base_host_virt_addr");
            match read_page(source_pid, number(&there[region], "hva") + offset) {
                Some(page) => install(&fds[0], 0xC028_AA03, [fault, page.as_ptr() as u64, 4096, 0, 0]),
                None => {
                    let gpa = number(&here[region], "gpa") + offset;
                    send_frame(
                        &stream,
                        &json!({"type": "memory_error", "gpa": gpa, "hva": fault, "lsb": 12,
                        "severity": "AR", "thread": 1, "origin": "read", "hop": 0}),
                    );
                    install(&fds[0], 0xC020_AA08, [fault, 4096, 0, 0, 0]);
                    ring(&fds[number(&message, "doorbell") as usize]);
                }
            }
        }
    });
}

fn next_fault(uffd: &OwnedFd, stream: &UnixStream) -> Option<u64> {
    loop {
        let poll = |fd: RawFd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut fds = [poll(uffd.as_raw_fd()), poll(stream.as_raw_fd())];
        // SAFETY: two entries, which outlive the call.
        assert!(unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) } > 0);
        if fds[1].revents != 0 {
            return None;
        }
        // struct uffd_msg: event in byte 0 (0x12 page fault), address in bytes 16..24.
        let mut message = [0u8; 32];
        // SAFETY: the buffer has the length of one message.
        let count = unsafe { libc::read(uffd.as_raw_fd(), message.as_mut_ptr().cast(), 32) };
        if count == 32 && message[0] == 0x12 {
            return Some(u64::from_ne_bytes(message[16..24].try_into().unwrap()) & !4095);
        }
    }
}

fn read_page(pid: u32, at: u64) -> Option<[u8; 4096]> {
    let mut page = [0u8; 4096];
    let local = libc::iovec { iov_base: page.as_mut_ptr().cast(), iov_len: 4096 };
    let remote = libc::iovec { iov_base: at as *mut libc::c_void, iov_len: 4096 };
    // SAFETY: the local vector is `page`; the remote one is only an address.
    (unsafe { libc::process_vm_readv(pid as i32, &local, 1, &remote, 1, 0) } == 4096).then_some(page)
}

fn ring(doorbell: &OwnedFd) {
    // SAFETY: the eight bytes that an eventfd wants.
    assert_eq!(unsafe { libc::write(doorbell.as_raw_fd(), 1u64.to_ne_bytes().as_ptr().cast(), 8) }, 8);
}

/// UFFDIO_COPY or UFFDIO_POISON; a page that another fault installed already is fine.
fn install(uffd: &OwnedFd, request: libc::c_ulong, mut argument: [u64; 5]) {
    // SAFETY: five words hold either structure.
    while unsafe { libc::ioctl(uffd.as_raw_fd(), request, argument.as_mut_ptr()) } != 0 {
        let error = std::io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EAGAIN) => argument[4] = 0,
            Some(libc::EEXIST | libc::ESRCH) => return,
            _ => panic!("install at {:#x}: {error}", argument[0]),
        }
    }
}
