//! The connection to the daemon: made again and again for ever, read in a thread of its own.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::time::Duration;

use serde_json::Value;

use crate::protocol::frame::{self, CONTROL_LIMIT, Decoder};

/// Time between attempts to connect.
const RETRY: Duration = Duration::from_millis(200);
/// A daemon that takes nothing for so long has lost its connection: the VMM does not wait for it.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);

/// An event of the connection. `connection` counts connections: events of an older one are void.
#[derive(Debug)]
pub enum ControlEvent {
    /// A new connection; the receiver says `hello` on it.
    Connected(ControlLink),
    /// A frame, or why the stream cannot be read further.
    Frame(u64, Result<Vec<u8>, frame::TooLong>),
    /// It ended.
    Lost(u64),
}

/// The writing half of a connection.
#[derive(Debug)]
pub struct ControlLink {
    /// Number of the connection.
    pub connection: u64,
    stream: UnixStream,
}

impl ControlLink {
    /// Sends one message. A failure ends the connection; the reader finds out.
    pub fn send(&mut self, message: &Value) {
        let sent = match frame::encode(message, CONTROL_LIMIT) {
            Ok(bytes) => self.stream.write_all(&bytes).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = sent {
            tracing::warn!(error, "control.send_failed");
            self.close();
        }
    }

    /// Ends the connection.
    pub fn close(&self) {
        // An error means that it has ended already.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

/// Connects for ever; returns when nobody listens to the events any more.
pub fn run<E: From<ControlEvent>>(socket: &PathBuf, events: &Sender<E>) {
    let mut announced = false;
    for connection in 0.. {
        match UnixStream::connect(socket) {
            Ok(stream) => {
                tracing::info!(socket = %socket.display(), "control.connected");
                announced = false;
                if serve(connection, &stream, events).is_none() {
                    return;
                }
            }
            Err(error) if !announced => {
                tracing::info!(socket = %socket.display(), %error, "control.waiting_for_daemon");
                announced = true;
            }
            Err(_) => {}
        }
        std::thread::sleep(RETRY);
    }
}

/// Reads until the connection ends; `None` when nobody listens.
fn serve<E: From<ControlEvent>>(connection: u64, mut stream: &UnixStream, events: &Sender<E>) -> Option<()> {
    let link = stream.try_clone().and_then(|writer| writer.set_write_timeout(Some(SEND_TIMEOUT)).map(|()| writer));
    let Ok(writer) = link else { return Some(()) };
    let send = |event: ControlEvent| events.send(event.into()).ok();
    send(ControlEvent::Connected(ControlLink { connection, stream: writer }))?;
    let (mut decoder, mut buffer) = (Decoder::new(CONTROL_LIMIT), vec![0; 64 << 10]);
    loop {
        match decoder.next_frame() {
            Ok(Some(frame)) => send(ControlEvent::Frame(connection, Ok(frame)))?,
            Ok(None) => match stream.read(&mut buffer) {
                Ok(0) | Err(_) => return send(ControlEvent::Lost(connection)),
                Ok(count) => decoder.push(&buffer[..count]),
            },
            Err(error) => {
                send(ControlEvent::Frame(connection, Err(error)))?;
                return send(ControlEvent::Lost(connection));
            }
        }
    }
}
