//! The framing of lanes: fixed little-endian records, no allocation. Pure.

use super::MAX_FRAME_PAGES;
use crate::layout::PAGE_SIZE;
use crate::layout::page_run::PoisonInfo;
use crate::proto::ErrorOrigin;

/// The first bytes of a lane.
pub const MAGIC: [u8; 8] = *b"VMFLANE1";
/// Bytes of a lane's token.
pub const TOKEN_BYTES: usize = 32;
/// Bytes of a hello.
pub const HELLO_BYTES: usize = MAGIC.len() + TOKEN_BYTES;
/// Bytes of an ask.
pub const ASK_BYTES: usize = 16;
/// Bytes of a frame before its contents.
pub const HEADER_BYTES: usize = 24;
/// Longest text of a FAILED frame, in bytes.
pub const MAX_REASON_BYTES: u32 = 4096;

/// The secret of one connection.
pub type LaneToken = [u8; TOKEN_BYTES];

/// The bytes that open a lane.
pub fn hello(token: &LaneToken) -> [u8; HELLO_BYTES] {
    let mut bytes = [0; HELLO_BYTES];
    bytes[..MAGIC.len()].copy_from_slice(&MAGIC);
    bytes[MAGIC.len()..].copy_from_slice(token);
    bytes
}

/// A half-open run of pages of 4 KiB in one region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    /// Number of the region in the layout.
    pub region: u32,
    /// First page.
    pub page: u64,
    /// Number of pages.
    pub count: u32,
}

impl Ask {
    /// As on the lane.
    pub fn encode(&self) -> [u8; ASK_BYTES] {
        let mut bytes = [0; ASK_BYTES];
        bytes[..4].copy_from_slice(&self.region.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.count.to_le_bytes());
        bytes[8..].copy_from_slice(&self.page.to_le_bytes());
        bytes
    }

    /// From the lane; any bytes are an ask, which may lie outside the layout.
    pub fn decode(bytes: &[u8; ASK_BYTES]) -> Self {
        Self { region: u32_at(bytes, 0), count: u32_at(bytes, 4), page: u64_at(bytes, 8) }
    }
}

/// The kind of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// The bytes of the pages follow.
    Data,
    /// Zeros, or a hole.
    Zero,
    /// Bad pages.
    Poison(PoisonInfo),
    /// The lane has sent every page that was lacking.
    End,
    /// `count` bytes of text follow: why the source cannot continue.
    Failed,
}

/// A frame but for its contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// Its kind.
    pub kind: FrameKind,
    /// Number of the region in the layout.
    pub region: u32,
    /// First page, of 4 KiB.
    pub page: u64,
    /// Number of pages; of bytes for FAILED.
    pub count: u32,
}

/// Bytes that are no frame, in words for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the source sent {0}")]
pub struct BadFrame(String);

impl FrameHeader {
    /// As on the lane.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let (kind, note) = match self.kind {
            FrameKind::Data => (1, None),
            FrameKind::Zero => (2, None),
            FrameKind::Poison(note) => (3, Some(note)),
            FrameKind::End => (4, None),
            FrameKind::Failed => (5, None),
        };
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = kind;
        if let Some(note) = note {
            // The numbers of ErrorOrigin are small: they are ours.
            bytes[1] = note.origin as i32 as u8;
            bytes[2] = note.guest_visible.into();
            bytes[20..].copy_from_slice(&note.hop.to_le_bytes());
        }
        bytes[4..8].copy_from_slice(&self.region.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.page.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.count.to_le_bytes());
        bytes
    }

    /// From the lane. The caller checks that the pages lie in the layout.
    ///
    /// # Errors
    /// [`BadFrame`]: an unknown kind or origin, or a count that its kind cannot have.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, BadFrame> {
        let (region, page, count) = (u32_at(bytes, 4), u64_at(bytes, 8), u32_at(bytes, 16));
        let kind = match bytes[0] {
            1 if count == 0 || u64::from(count) > MAX_FRAME_PAGES => {
                return Err(BadFrame(format!("DATA of {count} pages; 1 to {MAX_FRAME_PAGES} are allowed")));
            }
            1 => FrameKind::Data,
            2 | 3 if count == 0 => return Err(BadFrame("a frame of no pages".into())),
            2 => FrameKind::Zero,
            3 => {
                let origin = ErrorOrigin::try_from(i32::from(bytes[1]));
                let origin = origin.map_err(|_| BadFrame(format!("POISON of the unknown origin {}", bytes[1])))?;
                if bytes[2] > 1 {
                    return Err(BadFrame(format!("POISON with guest_visible {}", bytes[2])));
                }
                FrameKind::Poison(PoisonInfo { origin, guest_visible: bytes[2] == 1, hop: u32_at(bytes, 20) })
            }
            4 => FrameKind::End,
            5 if count > MAX_REASON_BYTES => {
                return Err(BadFrame(format!("a reason of {count} bytes; {MAX_REASON_BYTES} are allowed")));
            }
            5 => FrameKind::Failed,
            other => return Err(BadFrame(format!("a frame of the unknown kind {other}"))),
        };
        Ok(Self { kind, region, page, count })
    }

    /// Bytes that follow the header.
    pub fn contents_bytes(&self) -> usize {
        match self.kind {
            FrameKind::Data => self.count as usize * PAGE_SIZE as usize,
            FrameKind::Failed => self.count as usize,
            FrameKind::Zero | FrameKind::Poison(_) | FrameKind::End => 0,
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests;
