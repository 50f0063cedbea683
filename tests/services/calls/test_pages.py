"""Page tokens: whatever comes, a page or a refusal."""

from __future__ import annotations

import base64

import orjson
import pytest
from fleet.v1 import queue_pb2
from hypothesis import given
from hypothesis import strategies as st

from fleet_server.domain.errors import FleetError
from fleet_server.services.pages import page_key_of, token_of
from fleet_server.store import PageKey

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
)


def request(token: str = "", **filters: str) -> queue_pb2.ListJobsRequest:
    return queue_pb2.ListJobsRequest(page_token=token, **filters)  # type: ignore[arg-type]


def bound(content: object, like: str) -> str:
    """A token with our fingerprint and any other content."""
    ours = orjson.loads(base64.urlsafe_b64decode(like + "=" * (-len(like) % 4)))
    rest = content if isinstance(content, list) else [content]
    return base64.urlsafe_b64encode(orjson.dumps([ours[0], *rest])).decode().rstrip("=")


@given(st.integers(0, 2**53 - 1), st.text(min_size=1, max_size=100).filter(lambda text: text.isascii()))
def test_a_key_comes_back_as_it_went(time_ms: int, member: str) -> None:
    key = PageKey(time_ms, member)
    token = token_of(request(owner="a"), key)
    assert page_key_of(request(token, owner="a")) == key
    assert page_key_of(request()) is None and token_of(request(), None) == ""
    for other in (request(token), request(token, owner="b"), request(token, owner="a", node_id="a")):
        with pytest.raises(FleetError):
            page_key_of(other)


@given(st.text(max_size=200) | JSON.map(lambda value: bound(value, token_of(request(), PageKey(1, "a")))))
def test_any_other_text_is_refused(token: str) -> None:
    try:
        key = page_key_of(request(token))
    except FleetError as error:
        assert error.reason == "INVALID_PAGE_TOKEN" and error.violations[0].field == "page_token"
    else:
        assert (key is None) == (token == "")
