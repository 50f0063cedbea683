"""Defaults of unset optional fields, as the proto's field options give them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from fleet.transcode.v1 import options_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from fleet_server.protojson.enums import enum_names
from fleet_server.protojson.fields import Kind, field_kind, reached
from fleet_server.protojson.scalars import RANGES
from fleet_server.protojson.source import Source, assignment, attribute, indented

Default = int | float | str | bool

_lock = threading.RLock()
_fillers: dict[Descriptor, Callable[[Any], Any]] = {}
_source = Source()

_FORMS: dict[str, set[Kind]] = {
    "default_int": set(RANGES),
    "default_double": {Kind.FLOAT, Kind.DOUBLE},
    "default_string": {Kind.STRING, Kind.ENUM},
    "default_bool": {Kind.BOOL},
}


def default_of(field: FieldDescriptor) -> Default | None:
    """The default of a field as it stands in JSON (of an enum its word); None where it has none.

    Raises ValueError where the option does not fit the field: another type, no such word, not `optional`.
    """
    rules = field.GetOptions().Extensions[options_pb2.field]
    form = rules.WhichOneof("default")
    if form is None:
        return None
    default: Default = getattr(rules, form)
    kind = field_kind(field)
    if not kind.nullable or kind.message is not None:
        raise ValueError(f"{field.full_name}: only an optional scalar can have a default")
    if kind.kind not in _FORMS[form]:
        raise ValueError(f"{field.full_name}: {form} does not fit a {kind.kind.value}")
    if kind.enum is not None and default not in enum_names(kind.enum).numbers:
        raise ValueError(f"{field.full_name}: {default!r} is no word of {kind.enum.full_name}")
    if kind.kind in RANGES and isinstance(default, int):
        low, high = RANGES[kind.kind]
        if not low <= default <= high:
            raise ValueError(f"{field.full_name}: {default} is out of range")
    return default


def apply_defaults(message: Message) -> None:
    """Sets every unset optional field that has a default, in `message` and in all messages set inside it,
    those in lists and maps too. An unset message stays unset; a set field stays as it is, "" and 0
    included.
    """
    descriptor: Any = message.DESCRIPTOR
    fill = _fillers.get(descriptor) or _filler(descriptor)
    fill(message)


def _filler(message: Descriptor) -> Callable[[Any], Any]:
    with _lock:
        tree = reached(message)
        # Only messages on the way to a default get a function, so that plain ones cost nothing.
        useful = {m for m in tree if any(default_of(f) is not None for f in m.fields)}
        grown = True
        while grown:
            more = {m for m, inner in tree.items() if m not in useful and not useful.isdisjoint(inner)}
            grown = bool(more)
            useful |= more
        names = {m: _source.reserve("fill") for m in useful}
        _fillers.update({m: _source.define(name, "m", _lines(m, names)) for m, name in names.items()})
        return _fillers.setdefault(message, _nothing)


def _nothing(message: Message) -> None:
    """Fills a message without defaults."""


def _lines(message: Descriptor, names: dict[Descriptor, str]) -> list[str]:
    lines = ["h = m.HasField"]
    for field in message.fields:
        kind = field_kind(field)
        default = default_of(field)
        if default is not None:
            value = enum_names(kind.enum).numbers[str(default)] if kind.enum is not None else default
            lines.append(f"if not h({field.name!r}): {assignment(field.name, repr(value))}")
        elif kind.message in names:
            fill = names[kind.message]
            read = attribute(field.name)
            if kind.map_key is not None:
                lines += [f"for x in {read}.values():", *indented([f"{fill}(x)"])]
            elif kind.repeated:
                lines += [f"for x in {read}:", *indented([f"{fill}(x)"])]
            else:
                lines.append(f"if h({field.name!r}): {fill}({read})")
    return lines
