"""What a field is in JSON: the one table that the converters, the query parameters and OpenAPI are made
from.
"""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass

from fleet.transcode.v1 import options_pb2
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, OneofDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto


class Kind(enum.Enum):
    """The form of one value."""

    STRING = "string"
    BYTES = "bytes"
    BOOL = "bool"
    INT32 = "int32"
    UINT32 = "uint32"
    INT64 = "int64"
    UINT64 = "uint64"
    FLOAT = "float"
    DOUBLE = "double"
    ENUM = "enum"
    NULL = "null"
    MESSAGE = "message"
    TIMESTAMP = "timestamp"
    DURATION = "duration"
    FIELD_MASK = "field_mask"
    ANY = "any"
    STRUCT = "struct"
    VALUE = "value"
    LIST_VALUE = "list_value"


@dataclass(frozen=True, slots=True)
class FieldKind:
    """How a field looks in JSON.

    `kind` is the form of the value, of each element if `repeated`, of each value if `map_key` is set.
    `wrapped`: it is one of the wrapper messages around `kind`. `nullable`: an unset field prints null.
    `oneof`: the real oneof that it belongs to, whose other members are not printed. `message` and `enum` are
    set for those kinds.
    """

    kind: Kind
    repeated: bool = False
    map_key: Kind | None = None
    wrapped: bool = False
    nullable: bool = False
    oneof: OneofDescriptor | None = None
    message: Descriptor | None = None
    enum: EnumDescriptor | None = None


_SCALARS = {
    FieldDescriptor.TYPE_STRING: Kind.STRING,
    FieldDescriptor.TYPE_BYTES: Kind.BYTES,
    FieldDescriptor.TYPE_BOOL: Kind.BOOL,
    FieldDescriptor.TYPE_INT32: Kind.INT32,
    FieldDescriptor.TYPE_SINT32: Kind.INT32,
    FieldDescriptor.TYPE_SFIXED32: Kind.INT32,
    FieldDescriptor.TYPE_UINT32: Kind.UINT32,
    FieldDescriptor.TYPE_FIXED32: Kind.UINT32,
    FieldDescriptor.TYPE_INT64: Kind.INT64,
    FieldDescriptor.TYPE_SINT64: Kind.INT64,
    FieldDescriptor.TYPE_SFIXED64: Kind.INT64,
    FieldDescriptor.TYPE_UINT64: Kind.UINT64,
    FieldDescriptor.TYPE_FIXED64: Kind.UINT64,
    FieldDescriptor.TYPE_FLOAT: Kind.FLOAT,
    FieldDescriptor.TYPE_DOUBLE: Kind.DOUBLE,
}

WELL_KNOWN = {
    "google.protobuf.Timestamp": Kind.TIMESTAMP,
    "google.protobuf.Duration": Kind.DURATION,
    "google.protobuf.FieldMask": Kind.FIELD_MASK,
    "google.protobuf.Any": Kind.ANY,
    "google.protobuf.Struct": Kind.STRUCT,
    "google.protobuf.Value": Kind.VALUE,
    "google.protobuf.ListValue": Kind.LIST_VALUE,
}
"""Messages with a JSON form of their own, apart from the wrappers."""

_WRAPPERS_FILE = "google/protobuf/wrappers.proto"


def is_wrapper(message: Descriptor) -> bool:
    """Whether `message` is one of google.protobuf's wrappers around a scalar."""
    return message.file.name == _WRAPPERS_FILE


def message_kind(message: Descriptor) -> Kind:
    """The form of a message that is no wrapper."""
    return WELL_KNOWN.get(message.full_name, Kind.MESSAGE)


def is_map(field: FieldDescriptor) -> bool:
    """Whether `field` is a map."""
    message = field.message_type
    return message is not None and message.GetOptions().map_entry


@functools.cache
def _hidden_oneofs(message: Descriptor) -> frozenset[int]:
    """The indexes of the oneofs that stand for `optional` fields."""
    proto = DescriptorProto()
    message.CopyToProto(proto)
    return frozenset(field.oneof_index for field in proto.field if field.proto3_optional)


def real_oneof(field: FieldDescriptor) -> OneofDescriptor | None:
    """The oneof of `field` that was written as one, not the hidden one of an `optional` field."""
    oneof = field.containing_oneof
    if oneof is None or oneof.index in _hidden_oneofs(field.containing_type):
        return None
    return oneof


@functools.cache
def field_kind(field: FieldDescriptor) -> FieldKind:
    """What `field` is in JSON."""
    if is_map(field):
        entry = field.message_type.fields_by_name  # type: ignore[union-attr]
        key, value = entry["key"], entry["value"]
        inner = field_kind(value)
        return FieldKind(
            inner.kind,
            map_key=_SCALARS[key.type],
            wrapped=inner.wrapped,
            message=inner.message,
            enum=inner.enum,
        )
    oneof = real_oneof(field)
    nullable = field.has_presence and not field.is_repeated and oneof is None
    message = field.message_type
    if message is not None:
        wrapped = is_wrapper(message)
        kind = field_kind(message.fields_by_name["value"]).kind if wrapped else message_kind(message)
        return FieldKind(kind, field.is_repeated, None, wrapped, nullable, oneof, message)
    if field.enum_type is not None:
        kind = Kind.NULL if field.enum_type.full_name == "google.protobuf.NullValue" else Kind.ENUM
        return FieldKind(kind, field.is_repeated, None, False, nullable, oneof, enum=field.enum_type)
    return FieldKind(_SCALARS[field.type], field.is_repeated, None, False, nullable, oneof)


def reached(message: Descriptor) -> dict[Descriptor, list[Descriptor]]:
    """Every plain message inside `message`, itself included, with the plain messages directly inside it."""
    found: dict[Descriptor, list[Descriptor]] = {}
    waiting = [message]
    while waiting:
        current = waiting.pop()
        if current not in found:
            kinds = [field_kind(field) for field in current.fields]
            plain = [kind for kind in kinds if kind.kind is Kind.MESSAGE and not kind.wrapped]
            found[current] = [kind.message for kind in plain if kind.message is not None]
            waiting += found[current]
    return found


@functools.cache
def tagged_oneof(message: Descriptor) -> OneofDescriptor | None:
    """The oneof of `message` that prints as `type` and `data`, if it has one.

    Raises ValueError where the option names no oneof, or another field is called `type` or `data`.
    """
    name = message.GetOptions().Extensions[options_pb2.message].tagged_oneof
    if not name:
        return None
    oneof = message.oneofs_by_name.get(name)
    if oneof is None:
        raise ValueError(f"{message.full_name}: tagged_oneof names {name!r}, which is no oneof of this message")
    for field in message.fields:
        if field.name in ("type", "data") and real_oneof(field) is not oneof:
            raise ValueError(f"{field.full_name}: a message with a tagged_oneof has no place for this name")
    return oneof
