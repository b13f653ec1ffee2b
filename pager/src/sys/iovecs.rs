//! Addresses and lengths for one scattered read (`struct iovec`, readv(2)).

/// Where bytes that come one after the other are to be received, by one call.
#[derive(Debug, Default)]
pub struct IoVecs(Vec<libc::iovec>);

// SAFETY: addresses, at which only system calls write.
unsafe impl Send for IoVecs {}

impl IoVecs {
    /// Nowhere.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// In one buffer and nowhere else.
    pub fn only(&mut self, buffer: &mut [u8]) {
        self.clear();
        self.then(buffer.as_mut_ptr(), buffer.len());
    }

    /// Then at `at`; joined to what ends there.
    pub fn then(&mut self, at: *mut u8, bytes: usize) {
        match self.0.last_mut() {
            Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == at.cast() => last.iov_len += bytes,
            _ => self.0.push(libc::iovec { iov_base: at.cast(), iov_len: bytes }),
        }
    }

    /// As system calls take them.
    pub fn vectors(&mut self) -> &mut [libc::iovec] {
        &mut self.0
    }
}

#[cfg(test)]
mod tests;
