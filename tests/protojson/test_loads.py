"""Strict JSON: what is refused, and that nothing is lost on the fast road."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet_server.protojson import JsonError, dumps, loads


def refusal(body: bytes, **options: int) -> JsonError:
    with pytest.raises(JsonError) as caught:
        loads(body, **options)
    assert caught.value.reason == "MALFORMED_JSON"
    return caught.value


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{}x",
        b"NaN",
        b"[Infinity]",
        b"-Infinity",
        b"1e400",
        b"1" * 400,
        b"01",
        b"'a'",
        b"[1,]",
        b'{"a":1,}',
        b"// no\n{}",
        b'"\xff"',
        b'"\xed\xa0\x80"',
        b"\xef\xbb\xbf{}",
        b'"\\ud800"',
        b'"\\udc00\\ud800"',
        b'"a\x01b"',
        b"nul",
    ],
)
def test_refuses_what_is_not_json(body: bytes) -> None:
    assert refusal(body).description


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (b'{"a":1,"a":1}', "a"),
        (b'{"a" : 1, "a": 2}', "a"),
        (b'{"a":1,\n\t"b":{"c":[{},{"d":1,"d":1}]}}', "b.c[1].d"),
        (b'[{"x":0},{"a":"\\":","a":"\\":"}]', "[1].a"),
        # The same key, written in two ways.
        (b'{"a":1,"\\u0061":2}', "a"),
        # The lost value holds what the count looks for, and the kept one makes up for it.
        (b'{"a":"\\u0022:","a":"\\u0022:"}', "a"),
        (b'{"a":1,"a":"\\u0022:"}', "a"),
        (b'{"a":1,"a":"\\"\\u003a"}', "a"),
        (b'{"a":"\\":","a":1}', "a"),
        (b'{"a":{"b":1},"a":{"c":1}}', "a"),
        (b'{"a":1,"a"\r:1}', "a"),
        (b'{"":1,"":2}', '[""]'),
    ],
)
def test_names_the_duplicate_key(body: bytes, path: str) -> None:
    error = refusal(body)
    assert (error.path, "twice" in error.description) == (path, True)


@pytest.mark.parametrize(
    "number", [2**53, 2**53 + 1, 2**63, 2**64 - 1, 2**64, 2**64 + 1, -(2**63), -(2**63) - 1, 10**30, 10**300]
)
def test_integers_stay_whole(number: int) -> None:
    """Where the first reader refuses (it sees an infinite double), the text is refused; it is never rounded."""
    for text in (str(number), f'{{"a": {number}}}', f'{{"a":[{number}]}}'):
        assert json.dumps(loads(text.encode())) == json.dumps(json.loads(text))


def test_numbers_keep_their_kind() -> None:
    value = loads(b"[1, 1.0, 1e3, -0, -0.0, 0.1, 123456789012345678901234567890.0]")
    assert repr(value) == "[1, 1.0, 1000.0, 0, -0.0, 0.1, 1.2345678901234568e+29]"


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (b'"\\u0000"', ""),
        (b'{"a":{"b":["x","y\\u0000"]}}', "a.b[1]"),
        (b'{"a\\u0000":1}', '["a\\u0000"]'),
    ],
)
def test_refuses_nul(body: bytes, path: str) -> None:
    error = refusal(body)
    assert (error.path, "NUL" in error.description) == (path, True)


def test_a_backslash_before_u0000_is_no_nul() -> None:
    assert loads(b'"\\\\u0000"') == "\\u0000"


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_depth_is_counted_over_objects_and_lists(opening: bytes, closing: bytes) -> None:
    def nested(levels: int) -> bytes:
        return opening * levels + (b"" if opening == b"[" else b"1") + closing * levels

    assert loads(nested(64))
    assert "64" in refusal(nested(65)).description
    assert loads(nested(3), max_depth=3)
    assert refusal(nested(4), max_depth=3)
    assert refusal(nested(1000))
    assert refusal(nested(100_000))


def test_hidden_depth_is_refused() -> None:
    """The value that a duplicate key hides may be as deep as it likes: it is refused, one way or the other."""
    assert refusal(b'{"a":' + b"[" * 900 + b"]" * 900 + b',"a":1}')


def test_braces_in_strings_are_no_depth() -> None:
    text = "{[" * 100
    assert loads(dumps({"a": text})) == {"a": text}


def test_many_siblings_are_no_depth() -> None:
    value: Any = [{"a": {}} for _ in range(1000)]
    assert loads(dumps(value)) == value


@pytest.mark.parametrize(
    "text",
    ['{"a": "x\\": y", "b": 1}', '{ "a" : [ 1 , 2 ] }', '{"\\u00e9": "\\u0022:\\"", "a":{"a":{"a":""}}}', '"a"', " 1 "],
)
def test_sound_texts_of_any_spelling(text: str) -> None:
    assert loads(text.encode()) == json.loads(text)


_texts = st.text(st.sampled_from('ab":\\ {}[]1é,'), max_size=4)
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    _values, st.sampled_from([None, 1]), st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", " \n:")]), st.booleans()
)
def test_agrees_with_the_standard_library(
    value: Any, indent: int | None, separators: tuple[str, str], ensure_ascii: bool
) -> None:
    text = json.dumps(value, indent=indent, separators=separators, ensure_ascii=ensure_ascii)
    assert repr(loads(text.encode())) == repr(json.loads(text)).replace("-0,", "0,")


_pairs = st.lists(st.tuples(_texts, _texts), max_size=4)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(_pairs, st.sampled_from([":", ": ", " :", "\t: "]), st.booleans())
def test_finds_every_duplicate(pairs: list[tuple[str, str]], colon: str, ensure_ascii: bool) -> None:
    """Objects written pair by pair: refused exactly when a key comes twice."""
    written = [tuple(json.dumps(part, ensure_ascii=ensure_ascii) for part in pair) for pair in pairs]
    text = "{" + ",".join(f"{key}{colon}{value}" for key, value in written) + "}"
    if len(dict(pairs)) == len(pairs):
        assert loads(text.encode()) == dict(pairs)
    else:
        refusal(text.encode())
