"""What is printed, rule by rule."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest
from fleet.v1 import types_pb2
from google.protobuf import any_pb2, duration_pb2, json_format, struct_pb2, timestamp_pb2, wrappers_pb2

from fleet_server.protojson import JsonCodec
from tests.protos import load

torture: Any = load("torture")
codec = JsonCodec()


def encode(message: Any) -> Any:
    return codec.encode(message)


def test_every_field_is_there_in_order() -> None:
    assert list(encode(torture.Scalars())) == [field.name for field in torture.Scalars.DESCRIPTOR.fields]
    assert list(encode(types_pb2.Job())) == [field.name for field in types_pb2.Job.DESCRIPTOR.fields]


def test_unset_optional_and_message_fields_are_null() -> None:
    assert set(encode(torture.Optionals()).values()) == {None}
    printed = encode(torture.Optionals(f_int32=0, f_string="", f_bool=False, f_scalars={}))
    assert (printed["f_int32"], printed["f_string"], printed["f_bool"]) == (0, "", False)
    assert printed["f_scalars"]["f_int32"] == 0
    assert encode(torture.Lists())["f_scalars"] == []
    assert encode(torture.Maps())["trees"] == {}


@pytest.mark.parametrize(
    ("number", "printed"),
    [
        (0, 0),
        (2**53, 2**53),
        (2**53 + 1, "9007199254740993"),
        (-(2**53), -(2**53)),
        (-(2**53) - 1, "-9007199254740993"),
    ],
)
def test_64_bit_integers(number: int, printed: object) -> None:
    assert encode(torture.Scalars(f_int64=number))["f_int64"] == printed
    assert encode(torture.Optionals(f_int64=number))["f_int64"] == printed
    assert encode(torture.Lists(f_int64=[number]))["f_int64"] == [printed]
    assert encode(torture.Maps(by_int64={number: number}))["by_int64"] == {str(number): printed}
    assert encode(torture.Wrappers(f_int64={"value": number}))["f_int64"] == printed


def test_unsigned_64_bit_integers() -> None:
    printed = encode(torture.Scalars(f_uint64=2**64 - 1, f_fixed64=2**53))
    assert (printed["f_uint64"], printed["f_fixed64"]) == ("18446744073709551615", 2**53)


def test_enums_are_short_words() -> None:
    assert encode(types_pb2.Job(priority=types_pb2.JOB_PRIORITY_HIGH))["priority"] == "high"
    moods = encode(torture.Lists(f_mood=[0, 1, 2, 3, -4, 99]))["f_mood"]
    assert moods == ["unspecified", "happy", "sad", "3d", "cold", 99]


def test_floats() -> None:
    printed = encode(torture.Scalars(f_double=float("inf"), f_float=0.1))
    assert (printed["f_double"], printed["f_float"]) == ("Infinity", 0.1)
    assert encode(torture.Scalars(f_double=float("-inf"), f_float=float("nan")))["f_float"] == "NaN"
    assert codec.encode_bytes(wrappers_pb2.DoubleValue(value=1)) == b"1.0"


def test_floats_are_as_short_as_the_oracle_prints_them() -> None:
    rng = random.Random(7)
    numbers = [struct.unpack("<f", rng.randbytes(4))[0] for _ in range(4000)]
    numbers += [float(f"{rng.randrange(1, 999999)}e{rng.randrange(-40, 32)}") for _ in range(4000)]
    message = torture.Lists(f_float=[number for number in numbers if abs(number) < 3.4e38])
    printed = json_format.MessageToDict(message, preserving_proto_field_name=True)
    assert encode(message)["f_float"] == printed["f_float"]


def test_oneofs_print_the_set_member_alone() -> None:
    assert list(encode(torture.Choices(number=0))) == ["before", "number", "between", "after"]
    both = encode(torture.Choices(scalars={}, flag=False))
    assert both["flag"] is False
    assert both["scalars"]["f_int32"] == 0
    assert "text" not in both


def test_tagged_oneof() -> None:
    assert encode(torture.Event()) == {"id": "", "type": None, "data": None, "time": None}
    assert encode(torture.Event(id="7", count=2**60)) == {"id": "7", "type": "count", "data": str(2**60), "time": None}
    assert encode(torture.Event(ping={}))["data"] == {}
    assert encode(torture.Events(by_name={"a": torture.Event(note="")}))["by_name"]["a"]["data"] == ""


def test_times() -> None:
    message = torture.WellKnown()
    message.time.FromJsonString("1969-12-31T23:59:59.5Z")
    message.duration.FromJsonString("-0.000000001s")
    printed = encode(message)
    assert (printed["time"], printed["duration"]) == ("1969-12-31T23:59:59.500Z", "-0.000000001s")


def test_every_second_of_a_day_and_many_days() -> None:
    """The time of day and the date come from tables of their own."""
    for seconds in [*range(0, 86400, 7), *range(-62135596800, 253402300799, 86400 * 997 + 13)]:
        time = timestamp_pb2.Timestamp(seconds=seconds, nanos=seconds % 3 * 1000)
        assert encode(time) == time.ToJsonString()


@pytest.mark.parametrize(
    "bad",
    [
        timestamp_pb2.Timestamp(seconds=253402300800),
        timestamp_pb2.Timestamp(nanos=-1),
        duration_pb2.Duration(seconds=1, nanos=-1),
        duration_pb2.Duration(seconds=315576000001),
        struct_pb2.Value(number_value=float("nan")),
        any_pb2.Any(type_url="type.googleapis.com/no.Such"),
        any_pb2.Any(type_url="type.googleapis.com/google.protobuf.Int32Value", value=b"\xff"),
    ],
    ids=str,
)
def test_what_json_cannot_hold_is_an_error(bad: Any) -> None:
    with pytest.raises(ValueError):
        encode(bad)


def test_free_json_prints_integers() -> None:
    sent: dict[str, Any] = {
        "int": 3.0,
        "big": 2.0**53,
        "bigger": 2.0**53 + 2,
        "half": 0.5,
        "none": None,
        "list": [[1.0]],
    }
    wanted: dict[str, Any] = sent | {"int": 3, "big": 2**53, "list": [[1]]}
    printed = encode(json_format.ParseDict(sent, struct_pb2.Struct()))
    assert {key: repr(item) for key, item in printed.items()} == {key: repr(item) for key, item in wanted.items()}


def test_any_of_messages_and_of_special_forms() -> None:
    inner = any_pb2.Any()
    inner.Pack(torture.Event(note="x"))
    assert encode(inner) == {
        "@type": "type.googleapis.com/fleet.torture.v1.Event",
        "id": "",
        "type": "note",
        "data": "x",
        "time": None,
    }
    inner.Pack(duration_pb2.Duration(seconds=3))
    assert encode(inner)["value"] == "3s"
    assert encode(any_pb2.Any()) == {}


def test_http_body_data_is_base64() -> None:
    body = encode(torture.WellKnown(body={"content_type": "image/png", "data": b"\xff\xfe"}))["body"]
    assert body == {"content_type": "image/png", "data": "//4=", "extensions": []}


def test_field_mask_has_proto_names() -> None:
    assert (
        encode(torture.WellKnown(mask={"paths": ["max_retries", "payload.steps"]}))["mask"]
        == "max_retries,payload.steps"
    )


def test_one_field_alone() -> None:
    fields = torture.Optionals.DESCRIPTOR.fields_by_name
    message = torture.Optionals(f_uint64=2**60, f_mood=1, f_scalars={})
    assert codec.encode_field(message, fields["f_uint64"]) == str(2**60)
    assert codec.encode_field(message, fields["f_mood"]) == "happy"
    assert codec.encode_field(message, fields["f_bool"]) is None
    assert codec.encode_field(torture.Lists(f_uint64=[1]), torture.Lists.DESCRIPTOR.fields_by_name["f_uint64"]) == [1]
    choices = torture.Choices.DESCRIPTOR.fields_by_name
    assert codec.encode_field(torture.Choices(text="x"), choices["text"]) == "x"
    assert codec.encode_field(torture.Choices(text="x"), choices["number"]) is None


def test_deep_trees() -> None:
    tree = torture.Tree()
    leaf = tree
    for _ in range(90):
        leaf = leaf.left
    leaf.name = "end"
    printed = encode(tree)
    for _ in range(90):
        printed = printed["left"]
    assert printed["name"] == "end"
