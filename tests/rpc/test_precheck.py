"""The quick look before protovalidate: a sure yes is never wrong, and good messages of ours get it."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator
from typing import Any

import protovalidate
import pytest
from buf.validate import validate_pb2
from fleet.transcode.v1 import rules_pb2
from fleet.v1 import fleet_pb2, node_pb2, queue_pb2, types_pb2, vision_pb2
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, struct_pb2, timestamp_pb2, wrappers_pb2
from google.protobuf.descriptor import Descriptor
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet_server.protojson import apply_defaults
from fleet_server.rpc import precheck
from fleet_server.rpc.precheck import surely_valid
from tests.protojson.randoms import random_message

F = descriptor_pb2.FieldDescriptorProto
V: Any = validate_pb2
Rules = V.FieldRules
MODULES = (fleet_pb2, vision_pb2, queue_pb2, node_pb2, types_pb2)
OURS = [message for module in MODULES for message in module.DESCRIPTOR.message_types_by_name.values()]
validator = protovalidate.Validator()
numbers = itertools.count()


def is_good(message: Any) -> bool:
    return not validator.collect_violations(message)


def check(message: Any) -> None:
    """Nothing is called good that is not."""
    if surely_valid(message):
        assert is_good(message), message


def message_of(*fields: descriptor_pb2.FieldDescriptorProto, entry: Any = None) -> Descriptor:
    """A message with those fields, numbered in order."""
    package = f"precheck{next(numbers)}"
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
    imports = (V, rules_pb2, struct_pb2, timestamp_pb2, wrappers_pb2)
    file.dependency.extend(module.DESCRIPTOR.name for module in imports)
    enum = file.enum_type.add(name="Color")
    for number, name in ((0, "NONE"), (1, "RED"), (5, "BLUE")):
        enum.value.add(name=name, number=number)
    message = file.message_type.add(name="Message")
    for number, field in enumerate(fields, 1):
        added = message.field.add()
        added.CopyFrom(field)
        added.number = number
        if added.type_name:
            added.type_name = added.type_name.replace("PACKAGE", package)
        else:
            added.ClearField("type_name")
        if added.proto3_optional:
            added.oneof_index = len(message.oneof_decl)
            message.oneof_decl.add(name=f"_{added.name}")
    if entry is not None:
        message.nested_type.add().CopyFrom(entry)
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    return pool.FindMessageTypeByName(f"{package}.Message")


def field(
    kind: int, rules: Any, *, name: str = "v", optional: bool = False, repeated: bool = False, type_name: str = ""
) -> Any:
    made = F(name=name, type=kind, label=F.LABEL_REPEATED if repeated else F.LABEL_OPTIONAL, type_name=type_name)  # type: ignore[arg-type]
    made.proto3_optional = optional
    made.options.Extensions[V.field].CopyFrom(rules)
    return made


def stepped(step: int, **bounds: int) -> Any:
    rules = V.Int32Rules(**bounds)
    rules.Extensions[rules_pb2.multiple_of] = step
    return rules


INT32 = [
    Rules(int32=V.Int32Rules(gte=1, lte=20)),
    Rules(int32=V.Int32Rules(gt=1, lt=20)),
    Rules(int32=V.Int32Rules(gt=20, lt=1)),
    Rules(int32=V.Int32Rules(gte=7, lte=7)),
    Rules(int32=V.Int32Rules(const=19)),
    Rules(int32={"in": [1, 20]}),
    Rules(int32=V.Int32Rules(not_in=[0, 1])),
    Rules(int32=stepped(8)),
    Rules(int32=stepped(8, gte=0, lte=20)),
    Rules(required=True),
    Rules(required=True, int32=V.Int32Rules(lte=1)),
    Rules(ignore=V.IGNORE_IF_ZERO_VALUE, int32=V.Int32Rules(gte=1)),
    Rules(cel=[V.Rule(id="odd", message="must be odd", expression="this % 2 == 1")]),
]
DOUBLE = [
    Rules(double=V.DoubleRules(gte=0, lte=1)),
    Rules(double=V.DoubleRules(gt=0, lt=1)),
    Rules(double=V.DoubleRules(finite=True)),
    Rules(double=V.DoubleRules(const=1)),
    Rules(double={"in": [1, 0.5]}),
]
STRING = [
    Rules(string=V.StringRules(min_len=1, max_len=5)),
    Rules(string=V.StringRules(len=3)),
    Rules(string=V.StringRules(min_bytes=2, max_bytes=5)),
    Rules(string=V.StringRules(pattern="^[a-z0-9][a-z0-9_-]{0,2}$")),
    Rules(string=V.StringRules(pattern=r"\S")),
    Rules(string=V.StringRules(pattern="^[!-~]{1,4}$")),
    Rules(string=V.StringRules(pattern=r"^a.c$")),
    Rules(string=V.StringRules(pattern=r"^(a|b)+$")),
    Rules(string=V.StringRules(pattern=r"^\w+\.\d?$", max_len=9)),
    Rules(string={"in": ["a", "abc"]}),
    Rules(string=V.StringRules(not_in=["a"])),
    Rules(string=V.StringRules(const="abc")),
    Rules(string=V.StringRules(prefix="ab")),
    Rules(string=V.StringRules(email=True)),
    Rules(string=V.StringRules(uri=True)),
    Rules(required=True, string=V.StringRules(max_len=2)),
]
ENUM = [
    Rules(enum=V.EnumRules(defined_only=True)),
    Rules(enum=V.EnumRules(defined_only=True, not_in=[0])),
    Rules(enum={"in": [1]}),
    Rules(enum=V.EnumRules(const=5)),
]
LISTS = [
    Rules(repeated=V.RepeatedRules(min_items=1, max_items=2)),
    Rules(repeated=V.RepeatedRules(unique=True)),
    Rules(repeated=V.RepeatedRules(items=Rules(string=V.StringRules(min_len=1, max_len=2)))),
    Rules(repeated=V.RepeatedRules(items=Rules(required=True))),
    Rules(required=True),
    Rules(required=True, repeated=V.RepeatedRules(max_items=2)),
]
MAPS = [
    Rules(map=V.MapRules(min_pairs=1, max_pairs=2)),
    Rules(map=V.MapRules(keys=Rules(string=V.StringRules(max_len=1)))),
    Rules(map=V.MapRules(values=Rules(string=V.StringRules(min_len=1)))),
    Rules(required=True, map=V.MapRules(keys=Rules(string=V.StringRules(pattern="^[a-z]$")))),
]
TEXTS = [
    "",
    "a",
    "b",
    "ab",
    "abc",
    "abcd",
    "a\n",
    "a c",
    "a\nc",
    " ",
    "\v",
    "\t",
    "é",
    "ééé",
    "ééééé",
    "a.1",
    "a.",
    "a.٣",
]
TEXTS += ["ß.", "x" * 5, "x" * 6, "x@y.zz", "http://a/b", "a.1\n", "~~~~", "~~~~\n", "世", "\x7f", "\u2028"]
WHOLE = [-(2**31), -8, -1, 0, 1, 2, 7, 8, 9, 16, 19, 20, 21, 24, 2**31 - 1]
REAL = [0.0, -0.0, 1.0, 0.5, math.nextafter(1, 2), math.nextafter(0, -1), 5e-324, math.inf, -math.inf, math.nan, -1.0]


def scalar_cases() -> Iterator[tuple[Any, list[Any]]]:
    for kind, type_name, rules, values in (
        (F.TYPE_INT32, "", INT32, WHOLE),
        (F.TYPE_DOUBLE, "", DOUBLE, REAL),
        (F.TYPE_STRING, "", STRING, TEXTS),
        (F.TYPE_ENUM, ".PACKAGE.Color", ENUM, [-1, 0, 1, 2, 5, 6]),
    ):
        for rule in rules:
            yield (kind, type_name, rule), values


@pytest.mark.parametrize("optional", [False, True])
def test_scalars_at_the_edges_of_their_rules(optional: bool) -> None:
    yes = 0
    for (kind, type_name, rules), values in scalar_cases():
        make: Any = message_factory.GetMessageClass(
            message_of(field(kind, rules, optional=optional, type_name=type_name))
        )
        check(make())
        for value in values:
            message = make(v=value)
            check(message)
            yes += surely_valid(message)
    assert yes > 150


def test_lists_and_maps_at_the_edges_of_their_rules() -> None:
    yes = 0
    for rules in LISTS:
        make: Any = message_factory.GetMessageClass(message_of(field(F.TYPE_STRING, rules, repeated=True)))
        for size in range(4):
            for values in itertools.product(["", "a", "abc"], repeat=size):
                message = make(v=values)
                check(message)
                yes += surely_valid(message)
    entry = descriptor_pb2.DescriptorProto(name="VEntry")
    entry.field.add(name="key", number=1, type=F.TYPE_STRING, label=F.LABEL_OPTIONAL)
    entry.field.add(name="value", number=2, type=F.TYPE_STRING, label=F.LABEL_OPTIONAL)
    entry.options.map_entry = True
    for rules in MAPS:
        held = field(F.TYPE_MESSAGE, rules, repeated=True, type_name=".PACKAGE.Message.VEntry")
        make = message_factory.GetMessageClass(message_of(held, entry=entry))
        for pairs in ({}, {"a": "b"}, {"a": ""}, {"ab": "c"}, {"a": "b", "c": "d"}, {"a": "", "b": "", "c": ""}):
            message = make(v=pairs)
            check(message)
            yes += surely_valid(message)
    assert yes > 80


def test_messages_inside_are_judged() -> None:
    bad = queue_pb2.BatchCreateJobsRequest()
    bad.jobs.add(job_type=types_pb2.JOB_TYPE_IMAGE_GEN, priority=types_pb2.JOB_PRIORITY_HIGH).payload.update({"a": 1})
    assert surely_valid(bad) == is_good(bad) is True
    bad.jobs[0].max_retries = 1000
    assert (surely_valid(bad), is_good(bad)) == (False, False)


def test_rules_that_are_not_known_leave_the_message_to_protovalidate() -> None:
    stamp = Rules(timestamp=V.TimestampRules(lt_now=True))
    wrapped = Rules(string=V.StringRules(max_len=2))
    for rules, type_name, value in (
        (stamp, ".google.protobuf.Timestamp", timestamp_pb2.Timestamp(seconds=1)),
        (wrapped, ".google.protobuf.StringValue", wrappers_pb2.StringValue(value="abc")),
    ):
        make: Any = message_factory.GetMessageClass(message_of(field(F.TYPE_MESSAGE, rules, type_name=type_name)))
        assert surely_valid(make())
        assert not surely_valid(make(v=value))


@pytest.mark.parametrize("seed", range(3))
def test_random_messages_of_ours_are_never_called_good_wrongly(seed: int) -> None:
    rng = random.Random(seed)
    for descriptor in OURS:
        for _ in range(10):
            message = random_message(rng, descriptor)
            check(message)
            apply_defaults(message)
            check(message)


def test_good_requests_take_the_short_way() -> None:
    create = queue_pb2.CreateJobRequest(job_type=types_pb2.JOB_TYPE_IMAGE_GEN, priority=types_pb2.JOB_PRIORITY_HIGH)
    create.payload.update({"prompt": "sunset", "steps": 20, "loras": [{"name": "a"}]})
    create.target_labels["zone"] = "a"
    requests: list[Any] = [
        create,
        queue_pb2.GetJobRequest(job_id="0198f2c4-7a1e-7c3b-9d52-3f0e8a6b1c2d"),
        queue_pb2.ListJobsRequest(),
        fleet_pb2.FleetGenerateRequest(prompt="sunset", width=1024, height=768, steps=20, seed=7),
        vision_pb2.VisionGenerateRequest(prompt="sunset"),
    ]
    for request in requests:
        apply_defaults(request)
        assert is_good(request), request
        assert surely_valid(request), request


@given(
    st.text(alphabet="ab0_.-$^\\[]{}()?*+|dwsS1,", max_size=9),
    st.lists(st.text(alphabet="ab0_.-$ \n\vé1,", max_size=6), max_size=5),
)
@settings(max_examples=300, derandomize=True, deadline=None)
def test_patterns_that_are_taken_mean_the_same_to_both_engines(pattern: str, texts: list[str]) -> None:
    try:
        search = precheck._compiled(pattern).search
    except precheck._UnknownRuleError:
        return
    make: Any = message_factory.GetMessageClass(
        message_of(field(F.TYPE_STRING, Rules(string=V.StringRules(pattern=pattern))))
    )
    for text in texts:
        if search(text) is not None:
            assert is_good(make(v=text)), (pattern, text)


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "a|b", r"\s", "[[:alpha:]]", "(?i)a", r"\pN", "a$b", "a*b*", r"[^\S]", r"\x41"]
)
def test_patterns_that_could_differ_or_take_long_are_left_out(pattern: str) -> None:
    with pytest.raises(precheck._UnknownRuleError):
        precheck._compiled(pattern)


def test_an_end_of_line_is_no_end_of_text() -> None:
    assert precheck._compiled("^a$").search("a\n") is None
    assert re.search("^a$", "a\n") is not None
