"""The filter of `ListMigrations`: terms `field = value` joined by `AND` (a subset of AIP-160). Pure.

```
filter = [ term { "AND" term } ]
term   = field "=" value
value  = word | '"' { any but '"' and '\\' | '\\"' | '\\\\' } '"'
```

Field names and phases are case-sensitive, `AND` too. A field may come once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vmferry.model.facts import MoveFacts
from vmferry.model.migration import TERMINAL, Job, Phase

_TOKEN = re.compile(r'\s*(?:(?P<word>[^\s="]+)|(?P<equals>=)|"(?P<quoted>(?:[^"\\]|\\["\\])*)")')
FIELDS = ("vm", "phase", "destination", "active")
LENGTH_MAX = 1024


class FilterError(ValueError):
    """The filter breaks the grammar. The text names the place and the expected word."""


@dataclass(frozen=True, slots=True)
class Filter:
    """A parsed filter. None: the filter does not ask for this field."""

    vm: str | None = None
    phase: Phase | None = None
    destination: str | None = None
    active: bool | None = None

    def matches(self, job: Job | MoveFacts) -> bool:
        return (
            self.vm in (None, job.vm)
            and self.phase in (None, job.phase)
            and self.destination in (None, job.destination)
            and self.active in (None, job.phase not in TERMINAL)
        )


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    at: int

    def __str__(self) -> str:
        return f"{self.text!r} at character {self.at}"


def parse(text: str) -> Filter:
    """Raises: FilterError."""
    if len(text) > LENGTH_MAX:
        raise FilterError(f"{len(text)} characters; at most {LENGTH_MAX} are taken")
    tokens = _tokens(text)
    found: dict[str, str] = {}
    while tokens:
        field, value, tokens = _term(tokens, len(text))
        if field in found:
            raise FilterError(f"{field} comes twice")
        found[field] = value
        if tokens and (tokens[0].kind, tokens[0].text) != ("word", "AND"):
            raise FilterError(f"expected AND, found {tokens[0]}")
        if len(tokens) == 1:
            raise FilterError(f"expected a term after {tokens[0]}")
        tokens = tokens[1:]
    return Filter(
        vm=found.get("vm"),
        phase=_phase(found["phase"]) if "phase" in found else None,
        destination=found.get("destination"),
        active=_boolean(found["active"]) if "active" in found else None,
    )


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    position, end = 0, len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            raise FilterError(f"a quotation that does not end, from character {position}")
        kind = match.lastgroup or ""
        value = match.group(kind)
        tokens.append(_Token(kind, re.sub(r"\\(.)", r"\1", value) if kind == "quoted" else value, match.start(kind)))
        position = match.end()
    return tokens


def _term(tokens: list[_Token], end: int) -> tuple[str, str, list[_Token]]:
    field, equals, value = [*tokens[:3], *[_Token("end", "", end)] * 3][:3]
    if field.kind != "word" or field.text not in FIELDS:
        raise FilterError(f"expected one of {', '.join(FIELDS)}, found {field}")
    if equals.kind != "equals":
        raise FilterError(f"expected '=', found {equals}")
    if value.kind not in ("word", "quoted"):
        raise FilterError(f"expected a value for {field.text}, found {value}")
    return field.text, value.text, tokens[3:]


def _phase(text: str) -> Phase:
    try:
        return Phase(text)
    except ValueError:
        raise FilterError(f"no phase {text!r}; there are {', '.join(Phase)}") from None


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise FilterError(f"active must be true or false, is {text!r}")
    return text == "true"
