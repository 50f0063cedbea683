"""Our converters against google.protobuf.json_format, the oracle.

On every message of the torture proto and of fleet.v1 both sides must print the same, both must read the same message,
and both must refuse the same JSON, but for these listed differences. `listed.py` holds each of them as code.

| what | json_format | here |
|---|---|---|
| field names | proto names or camelCase in | proto names alone |
| unset optional and message fields | left out | null |
| enum values out | full name | short lower-case word |
| enum values in | full name, number, number in a string, boolean, fraction | word, full name, number |
| enum numbers beyond 32 bits in | cut to 32 bits | refused |
| 64-bit integers out | strings | numbers within 2^53, strings beyond |
| 64-bit integers in strings | anything that Python or C reads (" 5" apart), 1e3, +5, 5_0 | decimal digits |
| 64-bit integers in, as floats beyond 2^53 | rounded | refused |
| 32-bit integers, floats in strings | taken, NaN and Infinity too | refused |
| true and false for a float | taken | refused |
| integers that overflow a float | infinity | refused |
| Struct: integral numbers within 2^53 out | 1.0 | 1 |
| Struct: integers beyond 2^53 in | rounded | refused |
| Struct: depth in | any, though protobuf cannot parse it again | 30 objects or 45 lists |
| FieldMask | camelCase | proto names |
| the largest float out | 3.4028235e+38, which it does not read | its exact value |
| times, lengths, masks in | digits may lack, underscores, longer fractions | RFC 3339, plain digits |
| base64 in | foreign characters skipped | refused |
| map: null as a value | refused | left out, as null elsewhere (not where the value is free JSON) |
| null for a list of free values | refused, unlike for other lists | left out |
| map: a null under what is no boolean | refused for the null | refused for the key |
| map: two keys that are one number | the last one | refused |
| NUL in a string or key | taken | refused |
| "" or [] for an object | taken as {} | refused |
| a oneof's free member given as null beside another | the last one | refused |
| Any of a well-known type with more than a value | the rest ignored | refused |
| a tagged oneof | its member under its own name | `type` and `data` |
"""

from __future__ import annotations

import json
import os
import random
from typing import Any

import pytest
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from fleet_server.protojson import JsonCodec, JsonError, dumps, loads
from tests.protojson.listed import expected, for_json_format, stricter
from tests.protojson.randoms import damaged, random_message
from tests.protojson.types import product_types, torture_types

TORTURE, PRODUCT = torture_types(), product_types()
TYPES = [*TORTURE, *PRODUCT]
MESSAGES = int(os.environ.get("FLEET_CODEC_MESSAGES", "0"))
"""Of each type. Left out: 500 of the few that have every kind of field, 100 of the product's many."""
codec = JsonCodec()

pytestmark = pytest.mark.timeout(max(180, MESSAGES // 20))


def full_names() -> list[str]:
    return [descriptor.full_name for descriptor in TYPES]


def test_covers_the_product() -> None:
    """The list of types is found, not written; it must not come out empty."""
    assert {"fleet.v1.Job", "fleet.v1.Event", "fleet.torture.v1.Maps"} <= set(full_names())


def same(one: Any, other: Any) -> bool:
    """Equal with 1, 1.0 and true apart."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


@pytest.mark.parametrize("descriptor", TYPES, ids=full_names())
def test_agrees_with_the_oracle(descriptor: Descriptor) -> None:
    """Prints what the oracle prints; reads what it reads, sound and damaged: the same verdict, the same message."""
    rng = random.Random(descriptor.full_name)
    messages = MESSAGES or (500 if descriptor in TORTURE else 100)
    taken = 0
    for number in range(messages):
        message = random_message(rng, descriptor)
        printed = _oracle_print(message)
        if printed is None:
            with pytest.raises(ValueError):
                codec.encode(message)
            continue
        js = json.loads(codec.encode_bytes(message))
        assert same(js, printed), message
        if number % 10 == 0:
            _check_text_survives(descriptor, message)
        if number % 2:
            js = damaged(rng, descriptor, js)
        taken += _compare_reading(descriptor, js)
    assert taken > messages // 10


def _compare_reading(descriptor: Descriptor, js: Any) -> bool:
    """Whether the value was taken, by both."""
    text = json.dumps(js)
    reasons = list(stricter(descriptor, js))
    oracle = None if reasons else _oracle_read(descriptor, json.dumps(for_json_format(descriptor, js)))
    try:
        ours = codec.decode(descriptor, loads(text.encode()))
    except JsonError as error:
        assert oracle is None, f"only we refuse {text}: {error}"
        return False
    assert not reasons, f"we took {text} in spite of {reasons}"
    assert oracle is not None, f"only we take {text}"
    assert ours == oracle, text
    return True


def _oracle_print(message: Message) -> Any:
    descriptor: Any = message.DESCRIPTOR
    try:
        printed = json_format.MessageToDict(
            message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
    except (json_format.SerializeToJsonError, ValueError):
        return None
    return expected(descriptor, printed)


def _oracle_read(descriptor: Descriptor, text: str) -> Message | None:
    message: Message = message_factory.GetMessageClass(descriptor)()
    try:
        # A little deeper than the reader's own limit, which is the text's, not the message's.
        json_format.Parse(text, message, max_recursion_depth=200)
    except json_format.ParseError:
        return None
    return message


def _check_text_survives(descriptor: Descriptor, message: Message) -> None:
    """What we print, we read and print again, byte for byte but for the order of maps."""
    value = loads(dumps(codec.encode(message)))
    if not list(stricter(descriptor, value)):
        again = codec.encode(codec.decode(descriptor, value))
        assert same(again, value), value
