//! A VMM of the test's own: memory with a userfaultfd, attached on the memory socket.

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Mutex;

use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use vmferry_pager::internals::{Backing, Doorbell, Hva, MemoryLayout, Userfaultfd, fd_passing, memfd, needed_features};

use super::{PAGE, PATIENCE, eventually, layout};

pub struct Vmm {
    base: u64,
    pages: u64,
    backing: Backing,
    told: Mutex<Vec<Value>>,
    doorbell: Doorbell,
    _uffd: Userfaultfd,
    _memfd: Option<OwnedFd>,
    socket: UnixStream,
}

fn is_poison(outcome: io::Result<u8>) -> bool {
    matches!(outcome, Err(error) if error.raw_os_error() == Some(libc::EFAULT))
}

/// Reads a byte as the kernel reads it for a system call.
fn read_byte(at: u64) -> io::Result<u8> {
    let (mut reader, writer) = io::pipe()?;
    // SAFETY: the kernel checks the address and answers EFAULT; it waits where a thread would wait on a fault.
    let written = unsafe { libc::write(writer.as_raw_fd(), at as *const libc::c_void, 1) };
    if written != 1 {
        return Err(io::Error::last_os_error());
    }
    let mut byte = [0];
    reader.read_exact(&mut byte)?;
    Ok(byte[0])
}

fn frame(mut socket: &UnixStream) -> io::Result<Value> {
    let mut length = [0; 4];
    socket.read_exact(&mut length)?;
    let mut body = vec![0; u32::from_be_bytes(length) as usize];
    socket.read_exact(&mut body)?;
    Ok(serde_json::from_slice(&body)?)
}

impl Vmm {
    /// With the userfaultfd features that a pager asks for; the ranges are registered for missing pages.
    pub fn attach(socket: &Path, backing: Backing, pages: u64) -> Self {
        let size = pages * PAGE;
        let features = needed_features(&MemoryLayout::try_from(&layout(backing, pages)).unwrap());
        let file = (backing == Backing::Memfd).then(|| memfd("guest", size).unwrap());
        let (kind, fd) = match &file {
            Some(file) => (libc::MAP_SHARED, file.as_raw_fd()),
            None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
        };
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), size as usize, protection, kind, fd, 0) };
        assert_ne!(base, libc::MAP_FAILED);
        let base = base as u64;
        let uffd = Userfaultfd::create().unwrap();
        uffd.enable(features).unwrap();
        uffd.register(Hva(base), size).unwrap();
        let mut region = json!({"gpa": 0, "base_host_virt_addr": base, "size": size, "page_size": PAGE});
        let doorbell = Doorbell::new().unwrap();
        let mut fds = vec![uffd.as_fd(), doorbell.as_fd()];
        match &file {
            Some(file) => {
                fds.push(file.as_fd());
                region["backing"] = json!("memfd");
                region["fd"] = json!(2);
                region["offset"] = json!(0);
            }
            None => region["backing"] = json!("anonymous"),
        }
        let pid = std::process::id();
        let message = json!({"version": 1, "vm": "web-1", "role": "destination", "pid": pid, "uffd": 0, "doorbell": 1,
                             "regions": [region]});
        let socket = UnixStream::connect(socket).unwrap();
        fd_passing::send(&socket, message.to_string().as_bytes(), &fds).unwrap();
        assert_eq!(frame(&socket).unwrap(), json!({"type": "attached", "version": 1}));
        socket.set_nonblocking(true).unwrap();
        Self { base, pages, backing, told: Mutex::default(), doorbell, _uffd: uffd, _memfd: file, socket }
    }

    pub fn pid(&self) -> u32 {
        std::process::id()
    }

    /// A thread touches the page; its id, and how it ended.
    pub fn try_touch(&self, page: u64) -> (oneshot::Receiver<u32>, JoinHandle<io::Result<u8>>) {
        assert!(page < self.pages);
        let at = self.base + page * PAGE + 77;
        let (thread, tid) = oneshot::channel();
        let (sender, outcome) = oneshot::channel();
        std::thread::spawn(move || {
            // SAFETY: takes nothing.
            let _ = thread.send(unsafe { libc::gettid() } as u32);
            let _ = sender.send(read_byte(at));
        });
        let bounded = tokio::spawn(async move {
            tokio::time::timeout(*PATIENCE, outcome).await.expect("the thread waits for ever").unwrap()
        });
        (tid, bounded)
    }

    /// A thread touches the page, which is good.
    pub fn touch(&self, page: u64) -> JoinHandle<u8> {
        let (_, touch) = self.try_touch(page);
        tokio::spawn(async move { touch.await.unwrap().unwrap() })
    }

    /// The touch of a page that is poison ends so.
    pub async fn is_refused(touch: JoinHandle<io::Result<u8>>) -> bool {
        is_poison(touch.await.unwrap())
    }

    pub async fn is_marked(&self, page: u64) -> bool {
        Self::is_refused(self.try_touch(page).1).await
    }

    /// Gives pages back, as a balloon does.
    pub async fn remove(&self, page: u64, count: u64) {
        let (at, bytes) = (self.base + page * PAGE, (count * PAGE) as usize);
        let advice = if self.backing == Backing::Memfd { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
        // SAFETY: drops pages of the test's own mapping.
        let balloon = std::thread::spawn(move || unsafe { libc::madvise(at as *mut libc::c_void, bytes, advice) });
        eventually("madvise returns", async || balloon.is_finished()).await;
        assert_eq!(balloon.join().unwrap(), 0);
    }

    /// All memory errors told so far, once there are `count`.
    pub async fn told(&self, count: usize) -> Vec<Value> {
        eventually("memory errors are told", async || self.told_by_now().len() >= count).await;
        self.told_by_now()
    }

    /// All memory errors that are in the socket by now, or were. A frame is sent whole.
    pub fn told_by_now(&self) -> Vec<Value> {
        let mut told = self.told.lock().unwrap();
        told.extend(std::iter::from_fn(|| frame(&self.socket).ok()));
        told.clone()
    }

    /// Waits until the doorbell is rung, once or more often.
    pub async fn rung(&self) {
        eventually("the doorbell is rung", async || self.doorbell.answer()).await;
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        // SAFETY: mapped by `attach`; no thread of the test touches it any more.
        unsafe { libc::munmap(self.base as *mut libc::c_void, (self.pages * PAGE) as usize) };
    }
}
