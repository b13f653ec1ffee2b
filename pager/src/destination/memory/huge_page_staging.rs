//! Huge pages come in pieces of 4 KiB: what has come of one. Pure.

use crate::layout::PAGE_SIZE;

/// One page on its way in. Its bytes are zeros where nothing else has come.
#[derive(Debug)]
pub struct HugePageStaging {
    /// A bit a piece.
    got: Vec<u64>,
    left: u64,
    bytes: Vec<u8>,
}

impl HugePageStaging {
    /// Of so many pieces, nothing of it here.
    pub fn new(pieces: u64) -> Self {
        let got = vec![0; pieces.div_ceil(64) as usize];
        Self { got, left: pieces, bytes: vec![0; (pieces * PAGE_SIZE) as usize] }
    }

    fn has(&self, piece: u64) -> bool {
        self.got[(piece / 64) as usize] >> (piece % 64) & 1 == 1
    }

    /// Pieces from `piece` on are here, perhaps again; `None`: `count` pieces of zeros.
    pub fn add(&mut self, piece: u64, count: u64, bytes: Option<&[u8]>) {
        if let Some(bytes) = bytes {
            self.bytes[(piece * PAGE_SIZE) as usize..((piece + count) * PAGE_SIZE) as usize].copy_from_slice(bytes);
        }
        for piece in piece..piece + count {
            if !self.has(piece) {
                self.got[(piece / 64) as usize] |= 1 << (piece % 64);
                self.left -= 1;
            }
        }
    }

    /// The page, once all of it is here.
    pub fn whole(&self) -> Option<&[u8]> {
        (self.left == 0).then_some(&self.bytes)
    }
}

#[cfg(test)]
mod tests;
