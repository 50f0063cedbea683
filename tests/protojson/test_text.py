"""Query parameters and path variables."""

from __future__ import annotations

from typing import Any

import pytest
from fleet.v1 import queue_pb2, types_pb2

from fleet_server.protojson import JsonCodec, JsonError
from tests.protos import load

torture: Any = load("torture")
codec = JsonCodec()


def put(message: Any, path: str, *values: str) -> Any:
    codec.set_from_text(message, path, values)
    return message


def refusal(message: Any, path: str, *values: str) -> JsonError:
    with pytest.raises(JsonError) as caught:
        codec.set_from_text(message, path, values)
    return caught.value


def test_each_kind() -> None:
    message = torture.Optionals()
    for name, text in {
        "f_double": "1.5e3", "f_float": "-2", "f_int32": "-7", "f_int64": "9223372036854775807", "f_uint32": "7",
        "f_uint64": "18446744073709551615", "f_bool": "true", "f_string": "Grüße", "f_bytes": "-_8", "f_mood": "sad",
        "f_scalars.f_int32": "5",
    }.items():  # fmt: skip
        put(message, name, text)
    assert message == torture.Optionals(
        f_double=1500, f_float=-2, f_int32=-7, f_int64=2**63 - 1, f_uint32=7, f_uint64=2**64 - 1, f_bool=True,
        f_string="Grüße", f_bytes=b"\xfb\xff", f_mood=2, f_scalars={"f_int32": 5},
    )  # fmt: skip


def test_times_and_wrappers() -> None:
    message = put(torture.WellKnown(), "time", "2026-11-22T10:00:00+01:00")
    assert message.time.ToJsonString() == "2026-11-22T09:00:00Z"
    assert put(torture.WellKnown(), "duration", "1.5s").duration.nanos == 500_000_000
    assert put(torture.Wrappers(), "f_int32", "5").f_int32.value == 5
    assert put(torture.Wrappers(), "f_string", "").HasField("f_string")


def test_lists_take_all_values() -> None:
    request = put(queue_pb2.ListJobsRequest(), "status", "queued", "JOB_STATUS_RUNNING")
    assert list(request.status) == [types_pb2.JOB_STATUS_QUEUED, types_pb2.JOB_STATUS_RUNNING]


def test_a_string_stays_as_it_is() -> None:
    for text in ("", "5", "true", "null", " a "):
        assert put(torture.Scalars(), "f_string", text).f_string == text


BAD = {
    "f_int32": ["", "x", "1.0", "1e3", " 1", "+1", "0x1", "2147483648", "1_0", "null"],
    "f_uint64": ["-1", "18446744073709551616"],
    "f_double": ["", "NaN", "Infinity", "1.", ".5", "01", "1e400", "1,5", "0x1p3"],
    "f_bool": ["", "1", "True", "yes", "TRUE"],
    "f_string": ["a\0", "\ud800"],
    "f_bytes": ["!"],
    "f_mood": ["", "SAD", "2", "angry"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in BAD.items() for text in texts])
def test_refuses(name: str, text: str) -> None:
    error = refusal(torture.Scalars(), name, text)
    assert (error.path, error.reason) == (name, "INVALID_FIELD")


def test_more_than_one_value() -> None:
    assert "2 times" in refusal(torture.Scalars(), "f_int32", "1", "2").description
    assert put(torture.Scalars(), "f_int32") == torture.Scalars()


@pytest.mark.parametrize(
    "path",
    [
        "",
        "x",
        "f_scalars",
        "f_scalars.x",
        "f_scalars.",
        ".f_int32",
        "f_int32.x",
        "f_scalars.f_int32.x",
        "fInt32",
        "f__int32",
    ],
)
def test_unknown_parameters(path: str) -> None:
    assert refusal(torture.Optionals(), path, "1").reason == "UNKNOWN_FIELD"


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        (torture.Maps, "by_string"),
        (torture.Maps, "by_string.a"),
        (torture.Lists, "f_scalars"),
        (torture.Lists, "f_scalars.f_int32"),
        (torture.WellKnown, "struct"),
        (torture.WellKnown, "struct.fields"),
        (torture.WellKnown, "value"),
        (torture.WellKnown, "any"),
        (torture.WellKnown, "time.seconds"),
        (torture.Wrappers, "f_int32.value"),
        (torture.Event, "note"),
        (torture.Event, "type"),
        (torture.WellKnown, "empty"),
    ],
)
def test_what_text_cannot_set(kind: Any, path: str) -> None:
    assert refusal(kind(), path, "1").reason == "UNKNOWN_FIELD"


def test_the_error_helps() -> None:
    assert "did you mean job_type" in str(refusal(queue_pb2.ListJobsRequest(), "jobtype", "custom"))
    error = refusal(torture.Optionals(), "f_scalars.f_int23", "1")
    assert error.path == "f_scalars.f_int23"
    assert "f_int32" in error.description


def test_two_members_of_a_oneof() -> None:
    message = put(torture.Choices(), "text", "a")
    assert "together" in refusal(message, "number", "1").description
    assert put(message, "text", "b").text == "b"
    assert put(message, "flag", "true").flag
