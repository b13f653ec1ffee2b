use super::*;

#[test]
fn a_token_opens_one_lane_once() {
    let mut lane_tokens = LaneTokens::default();
    let (first, second) = (lane_tokens.agree(Agreed::Urgent).unwrap(), lane_tokens.agree(Agreed::Urgent).unwrap());
    assert_ne!(first, second);
    assert!(lane_tokens.redeem(&[0; 32]).is_none());
    assert!(lane_tokens.redeem(&second).is_some());
    assert!(lane_tokens.redeem(&second).is_none());
    assert!(lane_tokens.redeem(&first).is_some());
}

#[test]
fn the_oldest_of_too_many_is_forgotten() {
    let mut lane_tokens = LaneTokens::default();
    let tokens: Vec<_> = (0..=MAX_AGREED).map(|_| lane_tokens.agree(Agreed::Urgent).unwrap()).collect();
    assert!(lane_tokens.redeem(&tokens[0]).is_none());
    assert!(lane_tokens.redeem(&tokens[1]).is_some());
}
