"""Measures of prose: length of sentences, free relatives, banned words. Pure.

A free relative is a pronoun in place of a noun, so it hides the actor or the thing. The table of `BANNED` and the
pattern `_RELATIVE` have the words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

WORDS_A_SENTENCE = 30
RELATIVES_A_HUNDRED = 0.4

_RELATIVE = re.compile(r"\b(what|whatever|who|whoever|whom|whose|(?:of|by|in|to|on|for|from) which)\b", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z][\w'-]*")
_CODE = re.compile(r"`[^`]*`")
_END = re.compile(r"(?<=[.!?:;])[*_\")]*\s+(?=(?:vmferry|gRPC|userfaultfd|rumdl)\b|[A-Z`\"'(*_\[])")
BANNED = {
    re.compile(rf"\b(?:{words})\b", re.IGNORECASE): remedy
    for words, remedy in {
        "whoever|whomever": "name the actor",
        "(?:is|are|was|were|be) told of": "the actor reports it, or learns of it",
        "beside": "next to, during, besides",
        "meanwhile": "say during what",
        "now and then": "say how often",
        "st(?:and|ands|anding|ood) still": "is stopped, is frozen",
        "go(?:es)? on": "continues, resumes",
        "puts? aside": "preempts",
        "what is asked": "the request",
    }.items()
}


@dataclass(frozen=True, slots=True)
class Measure:
    """The prose of one file."""

    words: int
    long: tuple[str, ...]
    relatives: tuple[str, ...]
    banned: tuple[str, ...]

    def faults(self, sentences_too: bool) -> list[str]:
        """Each fault in words; none if the file passes. One free relative a file is always allowed."""
        found = [f"banned: {words}" for words in self.banned]
        if len(self.relatives) > max(1, self.words * RELATIVES_A_HUNDRED / 100):
            rate = 100 * len(self.relatives) / self.words
            found += [f"{rate:.2f} free relatives in 100 words, at most {RELATIVES_A_HUNDRED} pass"]
            found += [f"free relative: {sentence}" for sentence in self.relatives]
        if sentences_too:
            found += [f"{count(one)} words, at most {WORDS_A_SENTENCE} pass: {one}" for one in self.long]
        return found


def measure(paragraphs: Iterable[str]) -> Measure:
    """Measures a file's prose."""
    found = [sentence for paragraph in paragraphs for sentence in sentences(paragraph)]
    return Measure(
        words=sum(count(sentence) for sentence in found),
        long=tuple(sentence for sentence in found if count(sentence) > WORDS_A_SENTENCE),
        relatives=tuple(s for s in found if not s.endswith("?") for _ in _RELATIVE.findall(_without_code(s))),
        banned=tuple(
            f"{match[0]!r} ({remedy}): {sentence}"
            for sentence in found
            for pattern, remedy in BANNED.items()
            for match in pattern.finditer(_without_code(sentence))
        ),
    )


def sentences(paragraph: str) -> list[str]:
    """A paragraph's sentences. An abbreviation before a capital may cut one in two."""
    return [part for part in _END.split(" ".join(paragraph.split())) if _WORD.search(part)]


def count(sentence: str) -> int:
    """Words: numbers, signs and punctuation do not count, and code is one."""
    return len(_WORD.findall(_without_code(sentence)))


def _without_code(sentence: str) -> str:
    """Code between backticks is one word."""
    return _CODE.sub("`code`", sentence)
