"""Messages to JSON values, by functions compiled from the descriptors.

One function a message type: a dict display with an expression a field, so that a reply of twenty fields is
one run of straight-line code.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, OneofDescriptor
from google.protobuf.message import DecodeError, Message

from fleet_server.protojson import scalars
from fleet_server.protojson.enums import enum_names
from fleet_server.protojson.fields import (
    FieldKind,
    Kind,
    field_kind,
    is_wrapper,
    message_kind,
    reached,
    tagged_oneof,
)
from fleet_server.protojson.source import Source, attribute
from fleet_server.protojson.times import duration_out, timestamp_out
from fleet_server.protojson.wellknown import list_out, mask_out, struct_out, value_out

Encoder = Callable[[Any], Any]

_lock = threading.RLock()
_encoders: dict[Descriptor, Encoder] = {}
_field_encoders: dict[FieldDescriptor, Encoder] = {}
_names: dict[Descriptor, str] = {}
_waiting: list[Descriptor] = []

_PLAIN = {Kind.STRING, Kind.BOOL, Kind.INT32, Kind.UINT32}


def encoder(message: Descriptor) -> Encoder:
    """The function that makes JSON of a message of this type, compiled at the first call."""
    found = _encoders.get(message)
    if found is None:
        for inner in reached(message):
            # A bad option anywhere inside is found before anything is compiled.
            tagged_oneof(inner)
        with _lock:
            _name(message)
            _compile_waiting()
            found = _encoders[message]
    return found


def field_encoder(field: FieldDescriptor) -> Encoder:
    """The function that takes the whole message and makes JSON of one field; null where it prints null."""
    found = _field_encoders.get(field)
    if found is None:
        with _lock:
            found = _field_function(field)
            _compile_waiting()
            _field_encoders[field] = found
    return found


def _field_function(field: FieldDescriptor) -> Encoder:
    if field_kind(field).oneof is None:
        lines = ["h = m.HasField", f"return {_printed(field)}"]
    else:
        lines = [f"if not m.HasField({field.name!r}):", "    return None", f"return {_member(field)}"]
    return _source.define(_source.reserve("field"), "m", lines)


def any_out(message: Any) -> dict[str, Any]:
    """An Any as its content beside "@type". Raises ValueError where the type is not in the default pool."""
    if not message.type_url:
        if message.value:
            raise ValueError("Any without a type_url")
        return {}
    try:
        inner = descriptor_pool.Default().FindMessageTypeByName(message.type_url.rpartition("/")[2])
        content = message_factory.GetMessageClass(inner).FromString(message.value)
    except (KeyError, DecodeError) as error:
        raise ValueError(f"Any of {message.type_url}: {error}") from None
    value = encoder(inner)(content)
    if is_wrapper(inner) or message_kind(inner) is not Kind.MESSAGE:
        return {"@type": message.type_url, "value": value}
    return {"@type": message.type_url, **value}


_WELL_KNOWN: dict[Kind, Encoder] = {
    Kind.TIMESTAMP: timestamp_out,
    Kind.DURATION: duration_out,
    Kind.FIELD_MASK: mask_out,
    Kind.ANY: any_out,
    Kind.STRUCT: struct_out,
    Kind.VALUE: value_out,
    Kind.LIST_VALUE: list_out,
}

_source = Source(
    bytes_out=scalars.bytes_out,
    double_out=scalars.double_out,
    float_out=scalars.float_out,
    DOUBLE_MAX=scalars.DOUBLE_MAX,
    **{f"{kind.value}_out": function for kind, function in _WELL_KNOWN.items()},
)


def _name(message: Descriptor) -> str:
    """The name of a message's function; the message is compiled later if it is new."""
    name = _names.get(message)
    if name is None:
        kind = message_kind(message)
        if kind is Kind.MESSAGE:
            name = _source.reserve("encode")
            _waiting.append(message)
        else:
            name = f"{kind.value}_out"
            _encoders[message] = _WELL_KNOWN[kind]
        _names[message] = name
    return name


def _compile_waiting() -> None:
    # Published together: no other thread may meet a function whose inner ones are still to come.
    done: dict[Descriptor, Encoder] = {}
    while _waiting:
        message = _waiting.pop()
        if is_wrapper(message):
            lines = [f"return {_member(message.fields_by_name['value'])}"]
        else:
            asked = any(field_kind(field).nullable for field in message.fields)
            lines = [*(["h = m.HasField"] if asked else []), "return {", *_entries(message), "}"]
        done[message] = _source.define(_names[message], "m", lines)
    _encoders.update(done)


def _entries(message: Descriptor) -> list[str]:
    """The dict display of a message, in order of declaration; a oneof stands where its first member does."""
    tagged = tagged_oneof(message)
    done: set[str] = set()
    lines: list[str] = []
    for field in message.fields:
        oneof = field_kind(field).oneof
        if oneof is None:
            lines.append(f"    {field.name!r}: {_printed(field)},")
        elif oneof.name not in done:
            done.add(oneof.name)
            writers = _source.add("members", {f.name: _field_function(f) for f in oneof.fields})
            lines += _oneof_entries(oneof, writers, tagged is oneof)
    return lines


def _oneof_entries(oneof: OneofDescriptor, writers: str, tagged: bool) -> list[str]:
    chosen = f"(w := m.WhichOneof({oneof.name!r}))"
    if tagged:
        return [f"    'type': {chosen},", f"    'data': {writers}[w](m) if w is not None else None,"]
    return [f"    **({{w: {writers}[w](m)}} if {chosen} is not None else {{}}),"]


def _printed(field: FieldDescriptor) -> str:
    """The expression of a field that is always printed."""
    if field_kind(field).nullable:
        return f"({_member(field)} if h({field.name!r}) else None)"
    return _member(field)


def _member(field: FieldDescriptor) -> str:
    """The expression of a field that is known to be set, or has no presence."""
    kind = field_kind(field)
    read = attribute(field.name)
    if kind.map_key is not None:
        return _map(kind, kind.map_key, read)
    if not kind.repeated:
        return _one(kind, read, simple=False)
    if kind.kind in _PLAIN and not kind.wrapped:
        return f"{read}[:]"
    # A slice is a plain list, which is faster to walk than the container.
    return f"[{_one(kind, 'x', simple=True)} for x in {read}[:]]"


def _map(kind: FieldKind, map_key: Kind, read: str) -> str:
    # Asking for each value is faster than the container's items().
    key = {Kind.STRING: "k", Kind.BOOL: "('true' if k else 'false')"}.get(map_key, "str(k)")
    return f"{{{key}: {_one(kind, 'x', simple=True)} for c in ({read},) for k in c for x in (c[k],)}}"


def _one(kind: FieldKind, value: str, *, simple: bool) -> str:
    """The expression of one value. `simple`: `value` is a name, free to be named twice."""
    if kind.message is not None:
        return f"{_name(kind.message)}({value})"
    bound, name = (value, value) if simple else (f"(v := {value})", "v")
    match kind.kind:
        case Kind.INT64:
            return f"({name} if {-scalars.SAFE} <= {bound} <= {scalars.SAFE} else str({name}))"
        case Kind.UINT64:
            return f"({name} if {bound} <= {scalars.SAFE} else str({name}))"
        case Kind.DOUBLE:
            return f"({name} if -DOUBLE_MAX <= {bound} <= DOUBLE_MAX else double_out({name}))"
        case Kind.FLOAT:
            return f"float_out({value})"
        case Kind.BYTES:
            return f"bytes_out({value})"
        case Kind.NULL:
            return "None"
        case Kind.ENUM if kind.enum is not None:
            words = _source.add("words", dict(enum_names(kind.enum).words))
            return f"{words}.get({bound}, {name})"
        case _:
            return value


def encode(message: Message) -> Any:
    """`message` as a JSON value. Raises ValueError for what JSON cannot hold: a time out of range, an Any of
    an unknown type, NaN or Infinity in a Value.
    """
    descriptor: Any = message.DESCRIPTOR
    return encoder(descriptor)(message)
