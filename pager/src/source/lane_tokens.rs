//! Lanes that were agreed on and have not yet connected: each token opens one, once.

use std::collections::VecDeque;

use super::push_order::PushOrder;
use crate::lane::frame::LaneToken;

/// Agreed lanes that are kept; the oldest is forgotten beyond it.
const MAX_AGREED: usize = 64;

/// What was agreed on.
#[derive(Debug)]
pub(super) enum Agreed {
    /// The destination asks.
    Urgent,
    /// The source sends what is lacking.
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

    /// What a token opens; nothing the second time.
    pub fn redeem(&mut self, token: &LaneToken) -> Option<Agreed> {
        let at = self.0.iter().position(|(known, _)| same(known, token))?;
        self.0.remove(at).map(|(_, agreed)| agreed)
    }
}

fn random() -> std::io::Result<LaneToken> {
    let mut token = LaneToken::default();
    // So few bytes come whole (getrandom(2)).
    rustix::rand::getrandom(&mut token, rustix::rand::GetRandomFlags::empty())?;
    Ok(token)
}

/// Compares in a time that does not depend on where they differ.
pub(super) fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |all, (x, y)| all | (x ^ y)) == 0
}

#[cfg(test)]
mod tests;
