//! Frames: a 4-byte big-endian length, then that many bytes of JSON. Pure; both sockets use it.

/// Most bytes of a frame on the control socket: a device state of 64 MiB in base64, and the other fields.
pub const CONTROL_LIMIT: usize = 88 << 20;
/// Most bytes of a frame on the memory socket.
pub const MEMORY_LIMIT: usize = 64 << 10;

/// A frame that announces more than the limit. The stream cannot be read further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a frame of {announced} bytes; at most {limit} are allowed")]
pub struct TooLong {
    /// Bytes.
    pub announced: usize,
    /// Bytes.
    pub limit: usize,
}

/// Cuts a stream of bytes into frames, however the bytes arrive.
#[derive(Debug)]
pub struct Decoder {
    limit: usize,
    buffer: Vec<u8>,
}

impl Decoder {
    /// For frames of at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { limit, buffer: Vec::new() }
    }

    /// Takes what arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame; `None` until more arrives.
    ///
    /// # Errors
    /// [`TooLong`], as soon as the length is known.
    pub fn next_frame(&mut self) -> Result<Option<Vec<u8>>, TooLong> {
        let Some(head) = self.buffer.first_chunk::<4>() else { return Ok(None) };
        let announced = u32::from_be_bytes(*head) as usize;
        if announced > self.limit {
            return Err(TooLong { announced, limit: self.limit });
        }
        if self.buffer.len() < 4 + announced {
            return Ok(None);
        }
        let rest = self.buffer.split_off(4 + announced);
        let mut frame = std::mem::replace(&mut self.buffer, rest);
        frame.drain(..4);
        Ok(Some(frame))
    }
}

/// A message as a frame.
///
/// # Errors
/// [`TooLong`] where the message exceeds `limit`.
pub fn encode(message: &serde_json::Value, limit: usize) -> Result<Vec<u8>, TooLong> {
    let text = message.to_string();
    match u32::try_from(text.len()) {
        Ok(length) if text.len() <= limit => Ok([&length.to_be_bytes(), text.as_bytes()].concat()),
        _ => Err(TooLong { announced: text.len(), limit }),
    }
}

#[cfg(test)]
mod tests;
