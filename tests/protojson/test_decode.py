"""What is read and what is refused, rule by rule, and where the error points."""

from __future__ import annotations

from typing import Any

import pytest
from fleet.v1 import queue_pb2
from google.protobuf import any_pb2, struct_pb2, timestamp_pb2

from fleet_server.protojson import JsonCodec, JsonError, loads
from tests.protos import load

torture: Any = load("torture")
codec = JsonCodec()


def decode(kind: Any, value: object) -> Any:
    return codec.decode(kind.DESCRIPTOR, value)


def refusal(kind: Any, value: object) -> JsonError:
    with pytest.raises(JsonError) as caught:
        decode(kind, value)
    return caught.value


BAD: dict[str, list[object]] = {
    "f_int32": ["1", "", True, 1.5, 2**31, -(2**31) - 1, [], {}, 1e30, float("inf")],
    "f_uint32": [-1, 2**32, "1", -1.0],
    "f_int64": [2**63, -(2**63) - 1, "1.0", "1e3", " 1", "+1", "1_0", "", "x", "9223372036854775808", True, 0.5, 1e18],
    "f_uint64": [-1, 2**64, "-1", "18446744073709551616", 1e19, "\u0661"],
    "f_double": ["1", "NaN", True, [], 10**400, float("nan"), float("inf")],
    "f_float": ["1", 3.5e38, -(10**39), True],
    "f_bool": [0, 1, "true", "", []],
    "f_string": [1, True, [], {}, "a\0", "\ud800"],
    "f_bytes": [1, "!", "a", "QQ=", "QUJD=", "QQ===", "Q Q=", "é", []],
    "f_mood": ["HAPPY", "Happy", "angry", "", "1", True, 1.5, 2**31, [], {}],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values], ids=repr
)
def test_refuses_the_wrong_value_wherever_it_stands(name: str, value: object) -> None:
    assert refusal(torture.Scalars, {name: value}).path == name
    assert refusal(torture.Optionals, {name: value}).path == name
    good = decode(torture.Lists, {}).DESCRIPTOR.fields_by_name[name]
    assert refusal(torture.Lists, {good.name: [value]}).path == f"{name}[0]"
    assert refusal(torture.Lists, {"f_scalars": [{}, {name: value}]}).path == f"f_scalars[1].{name}"
    assert refusal(torture.Maps, {"by_sfixed64": {"5": {name: value}}}).path == f"by_sfixed64.5.{name}"
    assert refusal(torture.Event, {"type": "scalars", "data": {name: value}}).path == f"data.{name}"


GOOD: dict[str, list[tuple[object, object]]] = {
    "f_int32": [(1, 1), (-0.0, 0), (1e3, 1000), (-(2**31), -(2**31)), (2147483647.0, 2**31 - 1)],
    "f_uint32": [(2**32 - 1, 2**32 - 1)],
    "f_int64": [("9223372036854775807", 2**63 - 1), (-(2**63), -(2**63)), ("-0", 0), (2.0**53, 2**53)],
    "f_uint64": [(2**64 - 1, 2**64 - 1), ("18446744073709551615", 2**64 - 1)],
    "f_double": [(1, 1.0), (2**64, 2.0**64), (-0.5, -0.5)],
    "f_float": [(1, 1.0), (0.5, 0.5)],
    "f_bool": [(True, True), (False, False)],
    "f_string": [("Grüße 😀", "Grüße 😀"), ("", "")],
    "f_bytes": [("-_8=", b"\xfb\xff"), ("+/8", b"\xfb\xff"), ("", b"")],
    "f_mood": [("happy", 1), ("glad", 1), ("MOOD_SAD", 2), ("3d", 3), (77, 77), (2.0, 2), (-4, -4)],
}


@pytest.mark.parametrize(("name", "pair"), [(name, pair) for name, pairs in GOOD.items() for pair in pairs], ids=repr)
def test_takes_the_right_value_wherever_it_stands(name: str, pair: tuple[object, object]) -> None:
    value, wanted = pair
    assert getattr(decode(torture.Scalars, {name: value}), name) == wanted
    optional = decode(torture.Optionals, {name: value})
    assert optional.HasField(name)
    assert getattr(optional, name) == wanted
    assert list(getattr(decode(torture.Lists, {name: [value, value]}), name)) == [wanted, wanted]


def test_unknown_fields_are_named_with_their_path() -> None:
    error = refusal(queue_pb2.BatchCreateJobsRequest, {"jobs": [{}, {}, {}, {"prioritee": "high"}]})
    assert (error.path, error.reason) == ("jobs[3].prioritee", "UNKNOWN_FIELD")
    assert "priority" in error.description
    error = codec_path_error({"jobs": [{"x": 1}]}, "body")
    assert error.path == "body.jobs[0].x"


def codec_path_error(value: object, path: str) -> JsonError:
    with pytest.raises(JsonError) as caught:
        codec.decode(queue_pb2.BatchCreateJobsRequest.DESCRIPTOR, value, path=path)
    return caught.value


def test_camel_case_names_are_unknown() -> None:
    assert refusal(queue_pb2.CreateJobRequest, {"jobType": "image_gen"}).reason == "UNKNOWN_FIELD"
    assert decode(torture.Scalars, {"fieldWithCamel": "x"}).fieldWithCamel == "x"


def test_an_unknown_word_lists_the_right_ones() -> None:
    error = refusal(queue_pb2.CreateJobRequest, {"priority": "urgent"})
    assert (error.path, error.description) == ("priority", 'must be one of high, normal, low; got "urgent"')


def test_null_is_absent() -> None:
    names = [
        field.name for kind in (torture.Optionals, torture.Lists, torture.Maps) for field in kind.DESCRIPTOR.fields
    ]
    assert names
    for kind in (torture.Scalars, torture.Optionals, torture.Lists, torture.Maps, torture.Wrappers, torture.Choices):
        assert decode(kind, {field.name: None for field in kind.DESCRIPTOR.fields}) == kind()


def test_null_in_a_list_is_refused_but_in_free_json() -> None:
    for field in torture.Lists.DESCRIPTOR.fields:
        if field.name == "f_value":
            assert decode(torture.Lists, {"f_value": [None]}).f_value[0].HasField("null_value")
        else:
            assert refusal(torture.Lists, {field.name: [None]}).path == f"{field.name}[0]"


def test_null_in_a_map_is_left_out_but_in_free_json() -> None:
    maps = decode(torture.Maps, {"by_string": {"a": None, "b": "x"}, "trees": {"a": None}, "values": {"a": None}})
    assert (dict(maps.by_string), len(maps.trees)) == ({"b": "x"}, 0)
    assert maps.values["a"].HasField("null_value")


def test_null_for_a_value_is_a_value() -> None:
    assert decode(torture.WellKnown, {"value": None}).value.HasField("null_value")
    assert not decode(torture.WellKnown, {}).HasField("value")


@pytest.mark.parametrize("value", [{"text": "a", "number": 1}, {"number": 0, "scalars": {}}])
def test_two_members_of_a_oneof_are_refused(value: object) -> None:
    error = refusal(torture.Choices, value)
    assert "together" in error.description
    assert decode(torture.Choices, {"text": "a", "number": None, "flag": True}).flag


def test_a_null_that_is_a_value_counts_as_a_member() -> None:
    assert decode(torture.FreeChoice, {"value": None}).value.HasField("null_value")
    assert decode(torture.FreeChoice, {"nothing": None}).HasField("nothing")
    assert "together" in refusal(torture.FreeChoice, {"value": None, "text": "x"}).description
    assert decode(torture.FreeChoice, {"text": "x"}).text == "x"


def test_tagged_oneof() -> None:
    assert decode(torture.Event, {"data": 5, "type": "count", "id": "x"}).count == 5
    assert decode(torture.Event, {"type": "ping"}).HasField("ping")
    assert decode(torture.Event, {"type": None, "data": None}) == torture.Event()
    assert decode(torture.Events, {"last": {"type": "note", "data": ""}}).last.HasField("note")
    for value, path in [
        ({"type": "x"}, "type"),
        ({"type": 1}, "type"),
        ({"data": {}}, "type"),
        ({"type": "note"}, "data"),
        ({"type": "tree", "data": []}, "data"),
        ({"note": "x"}, "note"),
    ]:
        assert refusal(torture.Event, value).path == path


@pytest.mark.parametrize(
    ("key_field", "keys"),
    [
        ("by_int32", ["", "x", "1.0", " 1", "+1", "2147483648", "true"]),
        ("by_uint64", ["-1", "18446744073709551616"]),
        ("by_bool", ["1", "True", ""]),
        ("by_string", ["a\0"]),
    ],
)
def test_map_keys(key_field: str, keys: list[str]) -> None:
    for key in keys:
        assert refusal(torture.Maps, {key_field: {key: "1"}}).path.startswith(key_field)


def test_map_keys_of_every_kind() -> None:
    maps = decode(torture.Maps, {"by_bool": {"true": "a", "false": "b"}, "by_uint64": {"18446744073709551615": "1"}})
    assert (dict(maps.by_bool), dict(maps.by_uint64)) == ({True: "a", False: "b"}, {2**64 - 1: 1})
    assert "twice" in refusal(torture.Maps, {"by_int32": {"1": 1, "01": 2}}).description
    assert "twice" in refusal(torture.Maps, {"by_sfixed64": {"0": {}, "-0": {}}}).description


TIMES = {
    "2026-11-22T10:00:00Z": (1795341600, 0),
    "2026-11-22T10:00:00.12Z": (1795341600, 120_000_000),
    "2026-11-22T11:30:00.000000001+01:30": (1795341600, 1),
    "2026-11-21T23:00:00-11:00": (1795341600, 0),
    "0001-01-01T00:00:00Z": (-62135596800, 0),
    "9999-12-31T23:59:59.999999999Z": (253402300799, 999_999_999),
}


@pytest.mark.parametrize("text", TIMES)
def test_times(text: str) -> None:
    time = decode(timestamp_pb2.Timestamp, text)
    assert (time.seconds, time.nanos) == TIMES[text]


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-22",
        "2026-11-22T10:00:00",
        "2026-11-22t10:00:00Z",
        "2026-11-22T10:00:00z",
        "2026-11-22 10:00:00Z",
        "2026-02-29T00:00:00Z",
        "2026-11-22T24:00:00Z",
        "2026-11-22T10:00:60Z",
        "2026-11-22T10:00:00.Z",
        "2026-11-22T10:00:00.1234",
        "2026-11-22T10:00:00,123Z",
        "2026-11-22T10:00:00.\u0661Z",
        "2026-11-22T10:00:60.5Z",
        "2026-11-22T10:00:00.0123456789Z",
        "0001-01-01T00:00:00+00:01",
        "2026-11-22T10:00:00+24:00",
        "0000-01-01T00:00:00Z",
        "2026-11-22T10:00:00+0100",
        " 2026-11-22T10:00:00Z",
        "2026-11-22T10:00:00Z\n",
        "\u0662026-11-22T10:00:00Z",
        5,
        True,
    ],
)
def test_times_that_are_none(text: object) -> None:
    decode(torture.WellKnown, {"time": "2026-11-22T10:00:00.5Z"})  # a minute that was seen is read in fewer steps
    assert refusal(torture.WellKnown, {"time": text}).path == "time"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("1s", (1, 0)), ("-0.5s", (0, -500_000_000)), ("1.000000001s", (1, 1)), ("-3.1s", (-3, -100_000_000))],
)
def test_durations(text: str, wanted: tuple[int, int]) -> None:
    length = decode(torture.WellKnown, {"duration": text}).duration
    assert (length.seconds, length.nanos) == wanted


@pytest.mark.parametrize(
    "text", ["1", "s", "1.s", ".5s", "+1s", "1 s", "1.0000000001s", "315576000001s", "1e3s", 1, "1_0s"]
)
def test_durations_that_are_none(text: object) -> None:
    assert refusal(torture.WellKnown, {"duration": text}).path == "duration"


def test_free_json() -> None:
    value: dict[str, Any] = {
        "a": None,
        "b": [None, 1, 1.5, True, "x", {}, []],
        "c": {"d": 2**53, "e": -(2**53), "f": 1e300},
        "t": "x",
        "u": "Grüße",
        "v": {"": "", "w": 0},
    }
    assert codec.encode(decode(struct_pb2.Struct, value)) == value


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"seed": 2**53 + 1}, "struct.seed"),
        ({"a": {"b": [0, {"c": -(2**53) - 1}]}}, "struct.a.b[1].c"),
        ({"a": ["x\0"]}, "struct.a[0]"),
        ({"a": "x\0"}, "struct.a"),
        ({"a": "\ud800"}, "struct.a"),
        ({"a": float("inf")}, "struct.a"),
        ({"a\0": 1}, "struct"),
        ([], "struct"),
    ],
)
def test_free_json_that_is_refused(value: object, path: str) -> None:
    assert refusal(torture.WellKnown, {"struct": value}).path.startswith(path)


@pytest.mark.parametrize(("step", "most"), [({"a": None}, 30), ([None], 45)])
def test_free_json_is_never_too_deep_to_be_parsed(step: Any, most: int) -> None:
    """protobuf writes any depth and parses 100: what we take must survive the wire, a few messages further in."""

    def nested(levels: int) -> Any:
        value: Any = None
        for _ in range(levels):
            value = {"a": value} if isinstance(step, dict) else [value]
        return value

    name = "struct" if isinstance(step, dict) else "list"
    tree = torture.WellKnown()
    codec.decode_into(tree, {name: nested(most)})
    wrapped = any_pb2.Any()
    wrapped.Pack(tree)
    assert torture.WellKnown.FromString(tree.SerializeToString()) == tree
    assert "deep" in refusal(torture.WellKnown, {name: nested(most + 1)}).description
    assert "deep" in refusal(torture.WellKnown, {"value": nested(most + 1)}).description


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"@type": "no.Such"}, "any.@type"),
        ({"value": 1}, "any.@type"),
        ({"@type": 5}, "any.@type"),
        ({"@type": "type.googleapis.com/google.protobuf.Duration"}, "any"),
        ({"@type": "type.googleapis.com/google.protobuf.Duration", "value": "x"}, "any.value"),
        ({"@type": "type.googleapis.com/google.protobuf.Duration", "value": "1s", "x": 1}, "any"),
        ({"@type": "type.googleapis.com/fleet.torture.v1.Tree", "nam": ""}, "any.nam"),
        ("x", "any"),
    ],
)
def test_any_that_is_refused(value: object, path: str) -> None:
    assert refusal(torture.WellKnown, {"any": value}).path == path


def test_masks() -> None:
    assert list(decode(torture.WellKnown, {"mask": "a_b,c.d_e"}).mask.paths) == ["a_b", "c.d_e"]
    assert decode(torture.WellKnown, {"mask": ""}).HasField("mask")
    for text in ("aB", "a,", ",", "a..b", "a b", 5):
        assert refusal(torture.WellKnown, {"mask": text}).path == "mask"


@pytest.mark.parametrize("value", ["", "x", 1, True, None, []])
def test_an_object_is_an_object(value: object) -> None:
    for kind in (torture.Scalars, torture.Event, struct_pb2.Struct):
        assert "object" in refusal(kind, value).description
    if value is not None:
        assert refusal(torture.Optionals, {"f_scalars": value}).path == "f_scalars"
        assert refusal(torture.Maps, {"by_string": value}).path == "by_string"


@pytest.mark.parametrize("value", ["", "x", 1, True, {}])
def test_a_list_is_a_list(value: object) -> None:
    for field in torture.Lists.DESCRIPTOR.fields:
        assert refusal(torture.Lists, {field.name: value}).path == field.name


def test_decode_into_replaces_lists_and_maps() -> None:
    lists = torture.Lists(f_int32=[1, 2], f_scalars=[{}], f_string=["kept"])
    codec.decode_into(lists, {"f_int32": [3], "f_scalars": []})
    assert (list(lists.f_int32), len(lists.f_scalars), list(lists.f_string)) == ([3], 0, ["kept"])
    maps = torture.Maps(by_string={"a": "1"})
    codec.decode_into(maps, {"by_string": {"b": "2"}})
    assert dict(maps.by_string) == {"b": "2"}
    free = torture.WellKnown(struct={"a": 1}, list=[1, 2], mask={"paths": ["a"]})
    codec.decode_into(free, {"struct": {"b": 2}, "list": [3], "mask": "b"})
    assert codec.encode(free.struct) == {"b": 2}
    assert codec.encode(free.list) == [3]
    assert codec.encode(free.mask) == "b"


def test_one_field_alone() -> None:
    fields = torture.Optionals.DESCRIPTOR.fields_by_name
    message = torture.Optionals()
    codec.decode_field(message, fields["f_mood"], "sad")
    codec.decode_field(message, fields["f_scalars"], {"f_int32": 5})
    codec.decode_field(message, fields["f_bool"], None)
    assert message == torture.Optionals(f_mood=2, f_scalars={"f_int32": 5})
    with pytest.raises(JsonError) as caught:
        codec.decode_field(message, fields["f_scalars"], {"f_int32": "5"})
    assert caught.value.path == "f_int32"
    with pytest.raises(JsonError) as caught:
        codec.decode_field(message, fields["f_int32"], "5", path="job")
    assert str(caught.value).startswith("job: must be a whole number")
    lists = torture.Lists()
    with pytest.raises(JsonError) as caught:
        codec.decode_field(lists, torture.Lists.DESCRIPTOR.fields_by_name["f_scalars"], [{}, {"x": 1}])
    assert caught.value.path == "[1].x"


def test_numbers_of_any_size_from_text_to_message() -> None:
    assert decode(torture.Scalars, loads(b'{"f_uint64": 18446744073709551615}')).f_uint64 == 2**64 - 1
    assert refusal(torture.Scalars, loads(b'{"f_uint64": 18446744073709551616}')).path == "f_uint64"
    assert refusal(torture.WellKnown, loads(b'{"struct": {"seed": 18446744073709551616}}')).path == "struct.seed"


@pytest.mark.parametrize(
    "written",
    ["10:00:00x5Z", "10:00:00.٣Z", "10:00:00.²Z", "10:00:00.Z", "10:00:00.1234567891Z", "24:00:00.5Z", "10:00:60.5Z"],
)
def test_a_date_that_is_known_does_not_make_its_time_good(written: str) -> None:
    decode(timestamp_pb2.Timestamp, "2026-11-22T10:00:00.5Z")
    with pytest.raises(JsonError, match="time"):
        decode(timestamp_pb2.Timestamp, f"2026-11-22T{written}")
