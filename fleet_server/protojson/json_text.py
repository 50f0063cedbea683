"""Objects that are handed on as JSON text: what the option `json_text_of` of a string field asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import orjson
from fleet.transcode.v1 import options_pb2
from google.protobuf.descriptor import Descriptor

from fleet_server.protojson.errors import JsonError

_LONG_NUMBER = re.compile(rb"[0-9]{19}")


def texts_of(message: Descriptor) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The fields of a message that take the text of another member, each with that member's path."""
    for field in message.fields:
        path = field.GetOptions().Extensions[options_pb2.field].json_text_of
        if path:
            yield field.name, tuple(path.split("."))


def text_of(value: dict[str, Any], path: tuple[str, ...], name: str) -> dict[str, Any]:
    """The object with what stands at `path` taken out and put under `name` as text; `value` itself if nothing does.

    Only an object is taken: whatever else stands there is left to who judges it. Raises JsonError where `name` is given
    as well.
    """
    holders: list[dict[str, Any]] = [value]
    for part in path[:-1]:
        inner = holders[-1].get(part)
        if type(inner) is not dict:
            return value
        holders.append(inner)
    found = holders[-1].get(path[-1])
    if type(found) is not dict:
        return value
    if value.get(name) is not None:
        raise JsonError(f"must not be given together with {'.'.join(path)}; give one of them", path=name)
    rest: dict[str, Any] = {key: item for key, item in holders[-1].items() if key != path[-1]}
    for holder, part in zip(reversed(holders[:-1]), reversed(path[:-1]), strict=True):
        rest = {**holder, part: rest}
    return {**rest, name: dumps_exact(found)}


def loads_exact(text: bytes | str) -> Any:
    """The value of a JSON text as lenient readers take it (of duplicate keys the last counts), integers of any size as
    they are. Raises ValueError for what is no JSON, NaN and Infinity, and what is nested too deep.
    """
    body = text.encode() if isinstance(text, str) else text
    if _LONG_NUMBER.search(body) is None:
        return orjson.loads(body)
    # orjson makes floats of integers with more than 64 bits.
    try:
        return json.loads(body, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def dumps_exact(value: object) -> str:
    """Compact JSON text, integers of any size as they are."""
    try:
        return orjson.dumps(value).decode()
    except TypeError:
        # Only what has more than 64 bits gets here.
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
