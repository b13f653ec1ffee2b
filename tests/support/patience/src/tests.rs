use super::factor;

#[test]
fn without_a_word_the_factor_is_one() {
    assert_eq!(factor(""), 1.0);
    assert_eq!(factor("30"), 30.0);
    assert_eq!(factor("0.5"), 0.5);
}

#[test]
fn a_factor_that_is_no_positive_number_is_refused() {
    for text in ["0", "-1", "long", "nan", "inf"] {
        assert!(std::panic::catch_unwind(|| factor(text)).is_err(), "{text}");
    }
}
