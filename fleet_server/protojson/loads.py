"""Strict JSON: bytes to Python values and back.

orjson is fast but keeps the last of duplicate keys and turns integers of more than 64 bits into floats. What it
read is printed again: the same text, blanks apart, means that nothing was lost. Other texts (escapes, other forms of
numbers) have their colons or keys counted and are searched for runs of 19 digits; only what looks suspicious then is
read a second time, by the standard library with hooks, which decides exactly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import orjson

from fleet_server.protojson.errors import MALFORMED_JSON, JsonError, join, step
from fleet_server.protojson.scalars import text_in

# Every digit becomes "0", so that one search finds any long run.
_DIGITS = bytes.maketrans(b"123456789", b"000000000")
_BLANKS = b" \t\r\n"
# A byte is looked for as the number that it is: as bytes of length one it costs ten times as much.
_TAB, _LF, _CR, _BACKSLASH = b"\t\n\r\\"
# The first magnitude that orjson may round has 19 digits (below -2^63).
_LONG_RUN = b"0" * 19
# What orjson prints at most.
_DEEPEST = 250


def loads(body: bytes, *, max_depth: int = 64) -> object:
    """The value of a JSON text, integers exact at any size.

    Refuses with MALFORMED_JSON: what is not JSON or not UTF-8, NaN and Infinity, numbers beyond a double,
    duplicate keys (the path names them), lone surrogates, NUL in strings, more than `max_depth` objects and
    lists inside each other.
    """
    try:
        value: object = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise _malformed(_reason(error)) from None
    room = min(max_depth, _DEEPEST)
    if _openers(body) > room:
        # Braces within strings count too here; the walk is exact.
        _members(value, room)
    escapes = _BACKSLASH in body and b"\\u" in body
    if escapes and b"\\u0000" in body:
        _refuse_nul(value)
    printed = orjson.dumps(value)
    # Without blanks both are JSON still, of as many members and of the same numbers as before.
    if printed == body or printed.replace(b" ", b"") == _without_blanks(body):
        return value
    if escapes:
        # The keys themselves are counted: a colon, and the quote before it, may be written with \u. With more such
        # pairs than keys one was lost, or a string looks like one. White space goes away, so that each key's closing
        # quote is followed by its colon.
        whole = _members(value, room) == _without_blanks(body).count(b'":')
    else:
        # Each member has a colon, and all other colons stand in strings, in both texts alike: what was lost took at
        # least its own with it.
        whole = printed.count(b":") == body.count(b":")
    return value if whole and _LONG_RUN not in body.translate(_DIGITS) else _reread(body, room)


def _openers(body: bytes) -> int:
    """How many braces and brackets open in the text. Taking out what is rare is faster than counting it."""
    return 2 * len(body) - len(body.replace(b"{", b"")) - len(body.replace(b"[", b""))


def _without_blanks(body: bytes) -> bytes:
    """The text less its white space. On one line it has spaces alone, which go faster by themselves."""
    if _LF in body or _TAB in body or _CR in body:
        return body.translate(None, _BLANKS)
    return body.replace(b" ", b"")


def dumps(value: object) -> bytes:
    """Compact JSON of what `encode` returned. Raises TypeError for what JSON cannot hold."""
    return orjson.dumps(value)


def _members(value: object, max_depth: int) -> int:
    """How many keys all objects in `value` have together; refuses too much depth."""
    members = 0
    level: list[object] = [value]
    for _ in range(max_depth):
        inner: list[object] = []
        for item in level:
            if type(item) is dict:
                members += len(item)
                inner += [x for x in item.values() if type(x) is dict or type(x) is list]
            elif type(item) is list:
                inner += [x for x in item if type(x) is dict or type(x) is list]
        if not inner:
            return members
        level = inner
    raise _too_deep(max_depth)


def check_texts(value: object) -> None:
    """Refuses NUL and lone surrogates in a value that `loads` did not make."""
    try:
        if b"\\u0000" not in orjson.dumps(value):
            return
    except TypeError:
        pass  # half of a surrogate pair, or what is to be looked through otherwise: a number of more than 64 bits
    for path, text in _strings(value, ""):
        text_in(text, path)


class _Pairs(list[tuple[str, object]]):
    """An object as it was written, duplicates included."""


def _reread(body: bytes, max_depth: int) -> object:
    """The exact reading: duplicates found, integers whole."""
    try:
        written = json.loads(body, object_pairs_hook=_Pairs)
    except RecursionError:
        raise _too_deep(max_depth) from None
    except ValueError:
        # The standard library refuses to convert integers of thousands of digits.
        raise _malformed("holds a number with too many digits") from None
    return _rebuild(written, max_depth)


def _rebuild(value: object, room: int) -> object:
    if isinstance(value, _Pairs):
        if room < 1:
            raise _malformed("is nested too deep")
        built: dict[str, object] = {}
        for key, item in value:
            if key in built:
                raise JsonError("is given twice; give each key once", path=step(key), reason=MALFORMED_JSON)
            try:
                built[key] = _rebuild(item, room - 1) if type(item) in (_Pairs, list) else item
            except JsonError as error:
                raise error.within(step(key)) from None
        return built
    if isinstance(value, list):
        if room < 1:
            raise _malformed("is nested too deep")
        items: list[object] = []
        for item in value:
            try:
                items.append(_rebuild(item, room - 1) if type(item) in (_Pairs, list) else item)
            except JsonError as error:
                raise error.within(f"[{len(items)}]") from None
        return items
    return value


def _refuse_nul(value: object) -> None:
    """Refuses NUL characters; an escaped backslash before "u0000" is no NUL, hence the look at the
    strings.
    """
    for path, text in _strings(value, ""):
        if "\0" in text:
            raise JsonError("must not hold the NUL character", path=path, reason=MALFORMED_JSON)


def _strings(value: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield join(path, step(key)), key
            yield from _strings(item, join(path, step(key)))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _strings(item, f"{path}[{index}]")


def _malformed(description: str) -> JsonError:
    return JsonError(description, reason=MALFORMED_JSON)


def _too_deep(max_depth: int) -> JsonError:
    return _malformed(f"is nested deeper than {max_depth} levels")


def _reason(error: orjson.JSONDecodeError) -> str:
    if not error.doc:
        return "is empty; send a JSON value"
    return f"is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})"
