"""Recorded traffic and ours, made comparable: ids, times and counters are put aside."""

from __future__ import annotations

import re
from typing import Any

from tests.comfy_node import sample

Json = Any
_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_TAG = re.compile(r"_\d{5}_(?:[0-9a-f]{32})?(?=\.)")
_CLIENT = re.compile(r"[0-9a-f]{32}")
_TIMES = frozenset({"timestamp", "create_time", "traceback", "queue_remaining"})


def plain(value: Json) -> Json:
    """The value with ids, times and counters replaced by words."""
    if isinstance(value, dict):
        return {
            _words(name): "TIME" if name in _TIMES else plain(item) for name, item in value.items() if name != "__t"
        }
    if isinstance(value, list):
        if len(value) == 5 and isinstance(value[1], str) and _ID.fullmatch(value[1]):
            # An item of the queue: its number is a counter. When it came was not told by the version of the recording.
            item = ["NUMBER", *map(plain, value[1:])]
            item[3] = {**item[3], "create_time": "TIME"}
            return item
        return [plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return _words(value) if isinstance(value, str) else value


def _words(text: str) -> str:
    return _CLIENT.sub("CLIENT", _TAG.sub("_NUMBER_", _ID.sub("ID", text)))


def body(name: str) -> Json:
    """The body of a recorded exchange."""
    return sample(name)["body"]


def conversation(name: str) -> list[Json]:
    """A recorded conversation, comparable, without the `status` frames of prompts of others."""
    return [_frame(one) for one in sample(name)]


def _frame(one: Json) -> Json:
    if "__binary_bytes" in one:
        return f"binary {one['event_type_be32']}"
    return plain(one)


def heard(frames: list[Json]) -> list[Json]:
    """What a listener heard, comparable."""
    return [f"binary {int.from_bytes(one[:4], 'big')}" if isinstance(one, bytes) else plain(one) for one in frames]
