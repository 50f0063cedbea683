"""Random messages and random damage to JSON, from a seeded generator."""

from __future__ import annotations

import copy
import random
import struct
from typing import Any

from google.protobuf import any_pb2, duration_pb2, message_factory, timestamp_pb2, wrappers_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from tests.protojson.listed import Json, is_map

F = FieldDescriptor
STRINGS = [
    "",
    "a",
    "seed",
    "Grüße, 世界 😀",
    'quo"te\\',
    "line\nbreak\u2028",
    "1",
    "true",
    "null",
    "\x7f\x01",
    "x" * 300,
]
BYTES = [b"", b"\0", b"\xff\xfe\xfd", b"any carnal pleas", bytes(range(256))]
DOUBLES = [0.0, -0.0, 1.0, -1.5, 0.1, 1e-300, 5e-324, 1.7976931348623157e308, 2.0**53, 1e16, float("nan"), float("inf")]
FREE_NUMBERS = [0.0, 1.0, -3.0, 0.5, 2.0**53, -(2.0**53), 2.0**53 + 2, 1e300, -0.0, 1e15 + 0.5]
SIGNED_32 = [0, 1, -1, 2**31 - 1, -(2**31), 20]
UNSIGNED_32 = [0, 1, 2**32 - 1, 2**31]
SIGNED_64 = [0, 1, -1, 2**53, 2**53 + 1, -(2**53), -(2**53) - 1, 2**63 - 1, -(2**63), 1234567890123]
UNSIGNED_64 = [0, 1, 2**53, 2**53 + 1, 2**63, 2**64 - 1]
SECONDS = [0, -1, 1763800000, 86399, 86400, -62135596800, 253402300799, 253402300800]
LENGTHS = [0, 1, -1, 3600, 315576000000, -315576000000, 315576000001]
NANOS = [0, 1, 120_000_000, 1_000, 999_999_999, 500]
PATHS = ["priority", "payload.steps", "a", "max_retries"]


def random_message(rng: random.Random, descriptor: Descriptor, depth: int = 3) -> Message:
    """A message with each field set or not, values at the edges of their types among them."""
    message: Message = message_factory.GetMessageClass(descriptor)()
    _fill(rng, message, depth)
    return message


def _fill(rng: random.Random, message: Any, depth: int) -> None:
    name = message.DESCRIPTOR.full_name
    if name == "google.protobuf.Timestamp":
        message.seconds = rng.choice(SECONDS[: None if rng.random() < 0.05 else -1])
        message.nanos = rng.choice(NANOS)
    elif name == "google.protobuf.Duration":
        message.seconds = rng.choice(LENGTHS[: None if rng.random() < 0.05 else -1])
        nanos = rng.choice(NANOS)
        message.nanos = -nanos if message.seconds < 0 and rng.random() < 0.95 else nanos
    elif name == "google.protobuf.FieldMask":
        message.paths.extend(rng.sample(PATHS, rng.randrange(3)))
    elif name == "google.protobuf.Any":
        _fill_any(rng, message)
    elif name == "google.protobuf.Value":
        _fill_value(rng, message, depth)
    else:
        density = rng.choice((0.15, 0.5, 0.9))
        for field in message.DESCRIPTOR.fields:
            if rng.random() < density and (field.message_type is None or depth > 0):
                _fill_field(rng, message, field, depth - 1)


def _fill_field(rng: random.Random, message: Any, field: FieldDescriptor, depth: int) -> None:
    if is_map(field):
        assert field.message_type is not None
        key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        container = getattr(message, field.name)
        for _ in range(rng.randrange(1, 4)):
            if value.message_type is not None:
                _fill(rng, container[_scalar(rng, key)], depth)
            else:
                container[_scalar(rng, key)] = _scalar(rng, value)
    elif field.is_repeated:
        container = getattr(message, field.name)
        for _ in range(rng.randrange(1, 4)):
            if field.message_type is not None:
                _fill(rng, container.add(), depth)
            else:
                container.append(_scalar(rng, field))
    elif field.message_type is not None:
        inner = getattr(message, field.name)
        inner.SetInParent()
        _fill(rng, inner, depth)
    else:
        setattr(message, field.name, _scalar(rng, field))


def _scalar(rng: random.Random, field: FieldDescriptor) -> Any:
    if field.enum_type is not None:
        known = [value.number for value in field.enum_type.values]
        return rng.choice(known) if rng.random() < 0.9 or field.enum_type.is_closed else rng.choice((77, -77))
    match field.type:
        case F.TYPE_DOUBLE:
            return rng.choice(DOUBLES) if rng.random() < 0.5 else rng.uniform(-1e6, 1e6)
        case F.TYPE_FLOAT:
            # Any bit pattern of 32 bits is a float.
            bits = rng.getrandbits(32) if rng.random() < 0.5 else rng.choice((0, 0x3F800000, 0x7F7FFFFF, 0x3DCCCCCD))
            return struct.unpack("<f", struct.pack("<I", bits))[0]
        case F.TYPE_BOOL:
            return rng.random() < 0.5
        case F.TYPE_STRING:
            return rng.choice(STRINGS)
        case F.TYPE_BYTES:
            return rng.choice(BYTES)
        case F.TYPE_INT32 | F.TYPE_SINT32 | F.TYPE_SFIXED32:
            return rng.choice(SIGNED_32)
        case F.TYPE_UINT32 | F.TYPE_FIXED32:
            return rng.choice(UNSIGNED_32)
        case F.TYPE_INT64 | F.TYPE_SINT64 | F.TYPE_SFIXED64:
            return rng.choice(SIGNED_64)
        case _:
            return rng.choice(UNSIGNED_64)


def _fill_value(rng: random.Random, value: Any, depth: int) -> None:
    match rng.randrange(8 if depth > 0 else 6):
        case 0:
            value.null_value = 0
        case 1 | 2:
            value.number_value = rng.choice(FREE_NUMBERS) if rng.random() < 0.98 else rng.choice(DOUBLES[-2:])
        case 3:
            value.string_value = rng.choice(STRINGS)
        case 4:
            value.bool_value = rng.random() < 0.5
        case 5:
            pass
        case 6:
            value.struct_value.SetInParent()
            for _ in range(rng.randrange(3)):
                _fill_value(rng, value.struct_value.fields[rng.choice(STRINGS)], depth - 1)
        case _:
            value.list_value.SetInParent()
            for _ in range(rng.randrange(3)):
                _fill_value(rng, value.list_value.values.add(), depth - 1)


def _fill_any(rng: random.Random, message: any_pb2.Any) -> None:
    content: Message
    match rng.randrange(5):
        case 0:
            return
        case 1:
            content = timestamp_pb2.Timestamp(seconds=5, nanos=120_000_000)
        case 2:
            content = wrappers_pb2.Int64Value(value=rng.choice(SIGNED_64))
        case 3:
            content = any_pb2.Any()
            content.Pack(duration_pb2.Duration(seconds=3))
        case _:
            content = timestamp_pb2.Timestamp()
    message.Pack(content)


JUNK: list[Json] = [
    None, True, False, "", "x", "5", "-5", "5.0", "1e3", "+5", " 5", "5_0", "0x5", "high", "HIGH", "NaN", "Infinity",
    0, -1, 5, 1.0, -0.0, 1.5, 1e3, 2**31 - 1, 2**31, -(2**31) - 1, 2**32, 2**53, 2**53 + 1, 2**63, -(2**63) - 1,
    2**64 - 1, 2**64, 10**30, 9007199254740993.0, 1e18, 1e39, -1e300, 10**39,
    [], [None], [[]], [1, None], ["a", 1], {}, {"zzz": 1}, {"": None}, {"1": 1, "01": 2}, {"true": True},
    "nul\0", "QQ==", "QQ=", "QQ", "_-8", "!!!!", "Grüße", "2026-11-22T10:00:00Z", "2026-11-22T10:00:00.5+01:30",
    "2026-1-2T3:4:5Z", "2026-02-30T00:00:00Z", "0001-01-01T00:00:00+01:00", "2026-11-22T10:00:00", "2026-11-22",
    "1s", "-0.5s", "1.0000000001s", "315576000001s", "1", "1 s", "a,b_c.d", "aB", "a,,b", {"@type": "x"},
    {"@type": "type.googleapis.com/google.protobuf.Duration", "value": "3s"},
    {"@type": "type.googleapis.com/google.protobuf.Duration", "value": "3s", "more": 1},
    {"type": "note", "data": "x"}, {"type": "ping"},
]  # fmt: skip


def damaged(rng: random.Random, descriptor: Descriptor, js: Json) -> Json:
    """A copy of `js` with one or two places replaced, removed, renamed or added to."""
    root = {"root": copy.deepcopy(js)}
    for _ in range(rng.choice((1, 1, 2))):
        holder, key = rng.choice(list(_places(root)))
        match rng.randrange(10):
            case 0 if holder is not root:
                del holder[key]
            case 1 if isinstance(holder[key], dict):
                holder[key][rng.choice(("zzz", "fInt32", "createTime", "1", "\0", "NULL"))] = rng.choice(JUNK)
            case 2 if isinstance(holder, dict) and holder is not root:
                parts = key.split("_")
                holder["".join([parts[0], *(part.title() for part in parts[1:])])] = holder.pop(key)
            case _:
                holder[key] = copy.deepcopy(rng.choice(JUNK))
    return root["root"]


def _places(js: Json) -> Any:
    entries = js.items() if isinstance(js, dict) else enumerate(js) if isinstance(js, list) else ()
    for key, item in entries:
        yield js, key
        yield from _places(item)
