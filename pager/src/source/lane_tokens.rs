//! Lanes that are agreed on and not yet connected. Each token opens one lane, once.

use std::collections::VecDeque;

use super::push_order::PushOrder;
use crate::lane::frame::LaneToken;

/// Most agreed lanes. A further one displaces the oldest.
const MAX_AGREED: usize = 64;

/// The kind of a lane that is agreed on.
#[derive(Debug)]
pub(super) enum Agreed {
    /// The destination requests pages on it.
    Urgent,
    /// The source sends on it every page that the destination lacks.
    Bulk(PushOrder),
}

/// The agreed lanes by their tokens.
#[derive(Debug, Default)]
pub(super) struct LaneTokens(VecDeque<(LaneToken, Agreed)>);

impl LaneTokens {
    /// Agrees on a lane; returns its token.
    pub fn agree(&mut self, lane: Agreed) -> std::io::Result<LaneToken> {
        let token = random()?;
        if self.0.len() == MAX_AGREED {
            self.0.pop_front();
        }
        self.0.push_back((token, lane));
        Ok(token)
    }

    /// Takes the lane that a token opens; `None` for a token that is unknown or used.
    pub fn redeem(&mut self, token: &LaneToken) -> Option<Agreed> {
        let at = self.0.iter().position(|(known, _)| same(known, token))?;
        self.0.remove(at).map(|(_, agreed)| agreed)
    }
}

fn random() -> std::io::Result<LaneToken> {
    let mut token = LaneToken::default();
    // Up to 256 bytes come whole (getrandom(2)).
    rustix::rand::getrandom(&mut token, rustix::rand::GetRandomFlags::empty())?;
    Ok(token)
}

/// Compares in a time that does not depend on the place of the first difference.
pub(super) fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |all, (x, y)| all | (x ^ y)) == 0
}

#[cfg(test)]
mod tests;
