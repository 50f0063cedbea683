"""Query parameters and path variables: text to a field that may lie inside other messages
(`filter.status`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from fleet_server.protojson import scalars
from fleet_server.protojson.decode import field_decoder
from fleet_server.protojson.errors import JsonError
from fleet_server.protojson.fields import Kind, field_kind, tagged_oneof

_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)


def set_from_text(message: Message, field_path: str, values: Sequence[str]) -> None:
    """Sets the field at `field_path` (proto names, dotted) from one text, or a repeated field from all of
    them.

    Numbers are written as in JSON, booleans as true or false, enums by their words, bytes in base64, times as
    in JSON. Raises JsonError: UNKNOWN_FIELD where the path names nothing that text can set (objects, maps,
    lists of objects), else INVALID_FIELD; more than one value for a field that is not repeated, and two
    members of a oneof, are INVALID_FIELD.
    """
    parents, field = resolve(message.DESCRIPTOR, field_path)
    target: Any = message
    for parent in parents:
        target = getattr(target, parent)
    kind = field_kind(field)
    try:
        held = target.WhichOneof(kind.oneof.name) if kind.oneof is not None else None
        if held not in (None, field.name):
            raise JsonError(f"must not be given together with {held}; give one of them")
        if kind.kind is Kind.STRING:
            for index, value in enumerate(values):
                scalars.text_in(value, f"[{index}]" if kind.repeated else "")
        read = _READERS.get(kind.kind, _as_it_is)
        converted = [read(value) for value in values]
        if kind.repeated:
            field_decoder(field)(converted, target)
        elif len(converted) > 1:
            raise JsonError(f"is given {len(converted)} times; give it once")
        elif converted:
            field_decoder(field)(converted[0], target)
    except JsonError as error:
        error.within(field_path)
        raise


@functools.lru_cache(maxsize=4096)
def resolve(message: Descriptor, field_path: str) -> tuple[tuple[str, ...], FieldDescriptor]:
    """The names of the messages on the way, and the field at the end. Raises JsonError UNKNOWN_FIELD as
    set_from_text.
    """
    parents: list[str] = []
    names = field_path.split(".")
    for index, name in enumerate(names):
        field = _visible(message, name)
        last = index == len(names) - 1
        if field is None or not (_settable(field) if last else _enterable(field)):
            error = scalars.unknown(name, _known(message), "parameter")
            raise error.within(".".join(parents))
        if last:
            return tuple(parents), field
        parents.append(name)
        message = field.message_type  # type: ignore[assignment]
    raise AssertionError("a path has at least one name")


def _visible(message: Descriptor, name: str) -> FieldDescriptor | None:
    """The field as JSON knows it: the members of a tagged oneof have no names of their own there."""
    field = message.fields_by_name.get(name)
    if field is None or (tagged := tagged_oneof(message)) is None:
        return field
    return None if field_kind(field).oneof is tagged else field


def _settable(field: FieldDescriptor) -> bool:
    kind = field_kind(field)
    return kind.map_key is None and kind.kind not in _NOT_TEXT


def _enterable(field: FieldDescriptor) -> bool:
    kind = field_kind(field)
    return kind.kind is Kind.MESSAGE and not kind.repeated and kind.map_key is None and not kind.wrapped


def _known(message: Descriptor) -> tuple[str, ...]:
    fields = (f for f in message.fields if _visible(message, f.name) is f)
    return tuple(f.name for f in fields if _settable(f) or _enterable(f))


def _integer(value: str) -> object:
    # Digits only: 1e3 and 1.0 come from programs that print JSON, never from people or URLs.
    return int(value) if scalars.DECIMAL.fullmatch(value) else value


def _number(value: str) -> object:
    return float(value) if _NUMBER.fullmatch(value) else value


def _bool(value: str) -> object:
    return {"true": True, "false": False}.get(value, value)


def _as_it_is(value: str) -> object:
    return value


_READERS: dict[Kind, Callable[[str], object]] = {
    **dict.fromkeys(scalars.RANGES, _integer),
    Kind.FLOAT: _number,
    Kind.DOUBLE: _number,
    Kind.BOOL: _bool,
}
_NOT_TEXT = {Kind.MESSAGE, Kind.ANY, Kind.STRUCT, Kind.VALUE, Kind.LIST_VALUE, Kind.NULL}
