"""Page tokens and pages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.api.page_token import PageTokenError, decode, encode, paginate


@given(st.text(), st.text())
def test_a_token_gives_its_key_back(key: str, query: str) -> None:
    assert decode(encode(key, query), query) == key


@given(st.text(), st.text(), st.text())
def test_a_token_of_another_query_is_refused(key: str, query: str, other: str) -> None:
    if query != other:
        with pytest.raises(PageTokenError):
            decode(encode(key, query), other)


@given(st.text())
def test_any_text_is_refused_not_crashed_on(token: str) -> None:
    with pytest.raises(PageTokenError):
        decode(token, "q")


@given(st.text(min_size=1, max_size=20), st.data())
def test_a_cut_token_is_refused(key: str, data: st.DataObject) -> None:
    token = encode(key, "q")
    with pytest.raises(PageTokenError):
        decode(token[: data.draw(st.integers(0, len(token) - 1))], "q")


@given(st.sets(st.text(alphabet="abc", max_size=4)), st.integers(1, 5))
def test_pages_give_every_item_once_in_order(keys: set[str], size: int) -> None:
    items, seen, token = sorted(keys), list[str](), ""
    while True:
        page = paginate(items, lambda item: item, size, token, "q")
        assert len(page.items) <= size
        seen += page.items
        token = page.next_token
        if not token:
            break
    assert seen == items


def test_an_item_removed_between_pages_hides_no_other() -> None:
    first = paginate(["a", "b", "c"], lambda item: item, 2, "", "q")
    assert paginate(["a", "c"], lambda item: item, 2, first.next_token, "q").items == ("c",)
