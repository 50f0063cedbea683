"""Words of enums, kinds of fields and defaults: what OpenAPI and invoke take from the same tables."""

from __future__ import annotations

from typing import Any

import pytest
from fleet.v1 import types_pb2

from fleet_server.protojson import (
    JsonCodec,
    Kind,
    apply_defaults,
    default_of,
    enum_names,
    enum_words,
    field_kind,
    tagged_oneof,
)
from tests.protojson.types import BROKEN, product_types, torture_types
from tests.protos import load

torture: Any = load("torture")


def field(kind: Any, name: str) -> Any:
    return kind.DESCRIPTOR.fields_by_name[name]


def test_enum_words() -> None:
    assert enum_words(types_pb2.JobPriority.DESCRIPTOR) == ("high", "normal", "low")
    assert enum_words(torture.Mood.DESCRIPTOR) == ("happy", "sad", "3d", "cold", "last", "first")
    assert enum_words(torture.GPUKind.DESCRIPTOR) == ("unknown", "agx", "thor", "gpu")


def test_enum_names_read_more_than_they_print() -> None:
    names = enum_names(torture.Mood.DESCRIPTOR)
    assert (names.numbers["glad"], names.numbers["MOOD_GLAD"], names.numbers["unspecified"]) == (1, 1, 0)
    assert (names.words[1], names.words[0]) == ("happy", "unspecified")


def test_field_kinds() -> None:
    kind = field_kind(field(torture.Maps, "by_sfixed32"))
    assert (kind.kind, kind.map_key, kind.enum) == (Kind.ENUM, Kind.INT32, torture.Mood.DESCRIPTOR)
    kind = field_kind(field(torture.Lists, "f_wrapped"))
    assert (kind.kind, kind.repeated, kind.wrapped, kind.nullable) == (Kind.INT64, True, True, False)
    assert field_kind(field(torture.Optionals, "f_bool")).nullable
    assert field_kind(field(torture.Wrappers, "f_bytes")).nullable
    assert not field_kind(field(torture.Scalars, "f_bool")).nullable
    choice = field_kind(field(torture.Choices, "nothing"))
    assert choice.oneof is not None
    assert (choice.oneof.name, choice.nullable, choice.kind) == ("choice", False, Kind.MESSAGE)
    assert field_kind(field(torture.WellKnown, "mask")).kind is Kind.FIELD_MASK


def test_tagged_oneof() -> None:
    oneof = tagged_oneof(torture.Event.DESCRIPTOR)
    assert oneof is not None
    assert oneof.name == "event"
    assert tagged_oneof(torture.Choices.DESCRIPTOR) is None


@pytest.mark.parametrize("name", ["BadTag", "BadTagName"])
def test_bad_tags_are_found_when_prepared(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        JsonCodec().prepare([getattr(torture, name).DESCRIPTOR])


def test_the_product_is_sound() -> None:
    """Every option of the product's own protos fits, and both directions compile."""
    JsonCodec().prepare([*torture_types(), *product_types()])
    for message in product_types():
        for one in message.fields:
            default_of(one)


DEFAULTS = {
    "steps": 20,
    "big": 2**53 + 1,
    "cfg": 7.5,
    "prompt": 'a "quoted" \\ line\n',
    "mood": "happy",
    "exclusive": True,
    "lambda": False,
}


def test_default_of() -> None:
    found = {one.name: default_of(one) for one in torture.Defaults.DESCRIPTOR.fields}
    assert {name: value for name, value in found.items() if value is not None} == DEFAULTS
    assert found["seed"] is None


@pytest.mark.parametrize("name", ["implicit", "wrong_type", "no_word", "out_of_range"])
def test_bad_defaults(name: str) -> None:
    assert "BadDefault" in BROKEN
    with pytest.raises(ValueError, match=f"BadDefault.{name}"):
        default_of(field(torture.BadDefault, name))


def filled(message: Any) -> bool:
    return (message.steps, message.prompt, message.mood) == (20, DEFAULTS["prompt"], torture.MOOD_HAPPY)


def test_defaults_fill_what_is_unset() -> None:
    message = torture.Defaults()
    apply_defaults(message)
    assert filled(message)
    assert (message.big, message.cfg, message.exclusive) == (2**53 + 1, 7.5, True)
    assert message.HasField("lambda")
    assert not message.HasField("seed")
    assert not message.HasField("inner")


def test_defaults_leave_what_is_set() -> None:
    message = torture.Defaults(steps=0, prompt="", mood=0, exclusive=False, cfg=0)
    apply_defaults(message)
    assert (message.steps, message.prompt, message.mood, message.exclusive, message.cfg) == (0, "", 0, False, 0)


def test_defaults_reach_every_message_inside() -> None:
    message = torture.Defaults(
        inner={"inner": {}}, more=[{}, {"more": [{}]}], named={"a": torture.Defaults()}, chosen=torture.Defaults()
    )
    apply_defaults(message)
    inside = [
        message.inner,
        message.inner.inner,
        *message.more,
        message.more[1].more[0],
        message.named["a"],
        message.chosen,
    ]
    assert all(filled(one) for one in inside)
    assert not message.inner.inner.HasField("inner")


def test_defaults_reach_through_messages_that_have_none() -> None:
    message = torture.AroundDefaults(middle={"again": {"middle": {"ends": [{}]}}})
    apply_defaults(message)
    assert filled(message.middle.again.middle.ends[0])
    assert not message.middle.HasField("tree")


def test_messages_without_defaults() -> None:
    message = torture.Lists(f_scalars=[{}])
    apply_defaults(message)
    assert message == torture.Lists(f_scalars=[{}])
