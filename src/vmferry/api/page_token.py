"""Opaque page tokens: the start of the next page, bound to the query.

A token holds the last key shown and a digest of the query's other parameters: a token used with another filter is
refused (AIP-158). A check sum refuses a token that was cut or made up. A token is no secret.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

DEFAULT_SIZE = 50
MAX_SIZE = 1000
_SUM_LENGTH = 8


class PageTokenError(ValueError):
    """This daemon did not make the token for this query."""


def encode(after: str, query: str) -> str:
    body = after.encode()
    return base64.urlsafe_b64encode(_sum(body, query) + body).decode().rstrip("=")


def decode(token: str, query: str) -> str:
    """Returns the last key before the page. Raises: PageTokenError."""
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise PageTokenError("not a page token of this service") from error
    digest, body = raw[:_SUM_LENGTH], raw[_SUM_LENGTH:]
    if digest != _sum(body, query) or encode(body.decode(errors="replace"), query) != token:
        raise PageTokenError("a token of another query, or cut off")
    return body.decode()


def _sum(body: bytes, query: str) -> bytes:
    return hashlib.sha256(len(body).to_bytes(8, "big") + body + query.encode()).digest()[:_SUM_LENGTH]


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    items: tuple[T, ...]
    next_token: str


def paginate(items: Sequence[T], key: Callable[[T], str], size: int, token: str, query: str) -> Page[T]:
    """Cuts one page from `items`, which must ascend by `key`. If the key has been removed, the page begins with the
    first greater one.

    Raises:
        PageTokenError: the token is not of this query.
    """
    after = decode(token, query) if token else None
    first = 0 if after is None else bisect_right(items, after, key=key)
    limit = min(size or DEFAULT_SIZE, MAX_SIZE)
    shown = tuple(items[first : first + limit])
    return Page(shown, encode(key(shown[-1]), query) if len(items) - first > limit else "")
