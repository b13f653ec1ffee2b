"""The measure of prose itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.house.comments import prose
from tests.support.house.prose import count, measure, sentences


def faults(*paragraphs: str, sentences_too: bool = True) -> list[str]:
    return measure(paragraphs).faults(sentences_too)


def test_a_paragraph_is_cut_into_sentences() -> None:
    assert sentences("One is here. `Two` is\nthere: Three follows! The 4.5 GiB stay together, e.g. here.") == [
        "One is here.",
        "`Two` is there:",
        "Three follows!",
        "The 4.5 GiB stay together, e.g. here.",
    ]


def test_numbers_and_signs_are_no_words() -> None:
    assert count("It's 4 KiB → 2 MiB, the pager's own `memory_error`.") == 7


def test_code_is_one_word_whatever_it_says() -> None:
    assert count("Run `vmferry migrate whoever --to what` now.") == 3
    assert not faults("Run `whoever`.", "Run `what`.", "Run `what`.")


def test_a_sentence_of_30_words_passes_and_one_of_31_does_not() -> None:
    assert not faults("word " * 29 + "word.")
    assert faults("word " * 30 + "word.") == [f"31 words, at most 30 pass: {'word ' * 30}word."]
    assert not faults("word " * 30 + "word.", sentences_too=False)


@pytest.mark.parametrize(
    "words", ["whoever waits", "what is due", "of which two are bad", "by which it waits", "those who wait", "whose"]
)
def test_free_relatives_are_counted(words: str) -> None:
    assert len(measure([f"The pager serves {words}."]).relatives) == 1


@pytest.mark.parametrize("words", ["which pages arrive", "a page that waits", "the whole page", "What is a page?"])
def test_plain_relatives_and_questions_are_not(words: str) -> None:
    assert not measure([words]).relatives


def test_one_free_relative_passes_in_a_short_file_and_one_in_250_words_in_a_long_one() -> None:
    assert not faults("It says what happened.")
    assert faults("It says what happened.", "It says what it did.")
    assert not faults("It says what happened.", "It says what it did.", *["Many words follow here."] * 125)


@pytest.mark.parametrize(
    "words", ["whoever", "beside it", "is told of it", "meanwhile", "stands still", "goes on", "stood still"]
)
def test_banned_words_are_faults_with_a_remedy(words: str) -> None:
    (fault,) = [one for one in faults(f"The pager {words} here.") if one.startswith("banned")]
    assert f"{words.removesuffix(' it')!r} (" in fault


def test_good_prose_has_no_fault() -> None:
    assert not faults("The fault thread requests the page. The source answers with one or more frames.")


def test_the_prose_of_a_document() -> None:
    text = "# What is it\n\nA [page](what.md) of `what`.\n\n| what | b |\n|---|---|\n| c | d |\n\n```\nwhat\n```\n"
    assert list(prose(Path("a.md"), text)) == ["A page of `what`.", "what", "b", "c", "d"]


def test_the_prose_of_python() -> None:
    text = '"""Doc.\n\nRaises:\n    Error: why.\n    Other: why not.\n"""\nx = "what"  # a comment\n# two\n# lines\n'
    found = list(prose(Path("a.py"), text))
    assert found == ["Doc.", "Error: why.", "Other: why not.", "a comment two lines"]


def test_the_prose_of_rust() -> None:
    module = "//! Module.\n//!\n//! ```text\n//! what\n//! ```\n"
    item = "let x = 1; // what\n/// Item\n/// goes here.\nfn a() {}\n// Why.\n"
    assert list(prose(Path("a.rs"), module + item)) == ["Module.", "Item goes here.", "Why."]


def test_the_prose_of_other_files() -> None:
    assert list(prose(Path("a.proto"), "// One.\n//\n//   what\nmessage A {\n  // Two.\n}\n")) == ["One.", "Two."]
    assert list(prose(Path("a.toml"), '# One.\nkey = "what"\n')) == ["One."]
    with pytest.raises(ValueError, match=r"known: \.md"):
        list(prose(Path("a.txt"), ""))
