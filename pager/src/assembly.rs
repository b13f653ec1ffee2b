//! Huge pages come in pieces of 4 KiB: what has come of one. Pure.

/// One page on its way in.
#[derive(Debug)]
pub struct Assembly {
    /// A bit a piece.
    got: Vec<u64>,
    left: u64,
    /// Where its bytes are gathered; `None`: where they will stay.
    buffer: Option<Vec<u8>>,
}

impl Assembly {
    /// Of so many pieces, nothing of it here. `gathered`: in a buffer of so many bytes, zeros at first.
    pub fn new(pieces: u64, gathered: Option<u64>) -> Self {
        let got = vec![0; pieces.div_ceil(64) as usize];
        Self { got, left: pieces, buffer: gathered.map(|bytes| vec![0; bytes as usize]) }
    }

    /// Whether a piece is here.
    pub fn has(&self, piece: u64) -> bool {
        self.got[(piece / 64) as usize] >> (piece % 64) & 1 == 1
    }

    /// A piece is here, perhaps again.
    pub fn add(&mut self, piece: u64) {
        if !self.has(piece) {
            self.got[(piece / 64) as usize] |= 1 << (piece % 64);
            self.left -= 1;
        }
    }

    /// Whether all is here.
    pub fn is_whole(&self) -> bool {
        self.left == 0
    }

    /// The buffer, if it is gathered in one.
    pub fn buffer(&self) -> Option<&[u8]> {
        self.buffer.as_deref()
    }

    /// Where byte `offset` goes, if it is gathered in a buffer.
    pub fn at(&mut self, offset: u64) -> Option<*mut u8> {
        self.buffer.as_mut().and_then(|buffer| buffer.get_mut(offset as usize..)).map(<[u8]>::as_mut_ptr)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_whole_when_every_piece_has_come_in_whatever_order_and_how_often() {
        let mut page = Assembly::new(130, None);
        for piece in (0..130).rev().chain(0..130).chain([129]) {
            assert_eq!(page.is_whole(), page.has(129) && page.has(0) && (0..130).all(|p| page.has(p)));
            page.add(piece);
        }
        assert!(page.is_whole() && page.buffer().is_none());
    }

    #[test]
    fn what_has_not_come_reads_as_zeros() {
        let mut page = Assembly::new(2, Some(8192));
        assert!(page.at(8192).is_none_or(|_| false) || page.at(4096).is_some());
        assert!(page.buffer().is_some_and(|bytes| bytes.len() == 8192 && bytes.iter().all(|b| *b == 0)));
    }
}
