"""The OpenAPI document agrees with what the server takes and prints."""

from __future__ import annotations

import json
import re
from typing import Any

import protovalidate
import pytest
from fleet.v1 import fleet_pb2
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleet_server.bridge.httprule import rules_of, takes_raw_body
from fleet_server.bridge.openapi_rules import integer_pattern
from fleet_server.protojson import JsonError, apply_defaults, dumps
from tests.bridge.harbour import message
from tests.bridge.openapi_documents import (
    CODEC,
    CONTRACT,
    CONTRACT_DOCUMENT,
    DOCUMENT,
    FILES,
    SCHEMAS,
    validator,
)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.data())
def test_what_the_server_prints_is_what_the_document_says(data: st.DataObject) -> None:
    boat = message(FILES, "Boat")
    made = boat(
        name=data.draw(st.text(max_size=5)),
        drive=data.draw(st.sampled_from([1, 2])),
        weight=data.draw(st.integers(-(1 << 63), (1 << 63) - 1)),
        serial=data.draw(st.integers(0, (1 << 64) - 1)),
        beam=data.draw(st.floats(width=32, allow_nan=False, allow_infinity=False)),
        flag=data.draw(st.binary(max_size=5)),
        crew=data.draw(st.lists(st.text(max_size=3), max_size=2)),
        stores=data.draw(st.dictionaries(st.text(max_size=3), st.integers(-5, 5), max_size=2)),
        sunk=data.draw(st.booleans()),
    )
    if data.draw(st.booleans()):
        made.length, made.second_drive, made.draught = 3, 1, 0.5
        made.built.GetCurrentTime()
        made.range.FromSeconds(3)
        made.extra.update({"a": [1, None, {"b": "c"}]})
        made.any_value.number_value = 2
        made.wrapped.value = 4
        made.tender.drive = 1
        made.dinghies[4].drive = 2
        made.diesel = "yes"
    # Inner boats have an unset drive: the word for "not given" is no word of the document, so set them all.
    for inner in (made.tender, *made.dinghies.values()):
        inner.drive = 1
    printed = json.loads(dumps(CODEC.encode(made)))
    errors = list(validator(DOCUMENT, "Boat").iter_errors(printed))
    assert not errors, errors
    entry = message(FILES, "Entry")(id="1", arrival=made)
    assert validator(DOCUMENT, "Entry").is_valid(json.loads(dumps(CODEC.encode(entry))))
    assert not validator(DOCUMENT, "Entry").is_valid({"id": None, "type": "note", "data": 5})


def accepted(cls: Any, value: object, **path: str) -> bool:
    """Whether the server would take this JSON as the message."""
    try:
        made = CODEC.decode(cls.DESCRIPTOR, value)
    except JsonError:
        return False
    for name, text in path.items():
        setattr(made, name, text)
    apply_defaults(made)
    return not protovalidate.collect_violations(made)


BASE: dict[str, Any] = {
    "name": "Ann",
    "drive": "sail",
    "crew": ["a"],
    "arrival": "2026-11-22T10:00:00Z",
    "captain": "c",
    "replicas": 0,
    "crates": 1,
}
CANDIDATES: list[Any] = [
    *(None, "", "a", "Ann", " ", "\t", "a\0b", "blue", "green", "sail", "Sail", "DRIVE_MOTOR", "DRIVE_UNSPECIFIED"),
    *(
        "unspecified",
        "motor",
        "é" * 20,
        "é" * 21,
        "a.z",
        "a..z",
        "a.b.z",
        "x.z",
        "true",
        "12",
        "-5",
        "-6",
        "1.0",
        "1e2",
    ),
    *("9223372036854775807", "9223372036854775808", "18446744073709551615", "18446744073709551616", "-1"),
    *("-9223372036854775808", "-9223372036854775809", "AQ==", "AQ", "A", "A===", "AQID", "_-8", "2026-01-01T00:00:00Z"),
    *(
        "2026-01-01T00:00:00+01:00",
        "2026-13-01T00:00:00Z",
        "2026-01-01T24:00:00Z",
        "2026-01-01",
        "0000-01-01T00:00:00Z",
    ),
    *("2026-01-01t00:00:00z", "2026-01-01T00:00:60Z", "2026-01-01T00:00:00.123456789Z", "3s", "3.5s", "-1s", "3"),
    *(0, 1, 2, 3, 4, 5, -1, -2, -5, -6, 8, 9, 10, 11, 63, 64, 65, 72, 99, 100, 2048, 2049, 2056, 1.5, 64.0, 9.99, -0.5),
    *((1 << 31) - 1, 1 << 31, -(1 << 31), -(1 << 31) - 1, (1 << 32) - 1, 1 << 32, 1 << 53, (1 << 63) - 1, 1 << 63),
    *((1 << 64) - 1, 1 << 64, -(1 << 63), -(1 << 63) - 1, 1e30, 4e38, 1e308, True, False, [], {}, ["a"], ["a"] * 3),
    *(["a"] * 4, [""], ["a" * 8], ["a" * 9], [1], [None], [{}], {"a": "b"}, {"": "b"}, {"a": None}, {"a": "12345"}),
    *(
        {"a": 1},
        {"1": True},
        {"x": True},
        {"-2147483648": False},
        {"2147483648": False},
        {"1": "x"},
        {"a": [1, {"b": None}]},
    ),
    *({"a": 1 << 54}, {"a\0": 1}, {"name": "x"}, {"name": ""}, {"name": "x", "unknown": 1}, [{"name": "x"}]),
    *([{"name": "x"}] * 1, [{"name": "x"}, {"name": "y"}, {"name": "z"}], {"a": "b", "c": "d", "e": "f"}),
]


def _fields() -> list[str]:
    return list(SCHEMAS["MoorRequestBody"]["properties"])


@pytest.mark.parametrize("field", [*_fields(), "unknown", "berth"])
def test_the_document_and_the_server_agree_on_every_value_of_every_field(field: str) -> None:
    """Both ways: nothing that the document allows is refused, nothing that it forbids is taken."""
    moor = message(FILES, "MoorRequest")
    judge = validator(DOCUMENT, "MoorRequestBody")
    differ = []
    for value in CANDIDATES:
        request = {**BASE, field: value}
        taken = accepted(moor, request, berth="abc") and not (field == "berth" and value is not None)
        if judge.is_valid(request) != taken:
            differ.append((value, "is taken" if taken else "is refused"))
    without = {key: value for key, value in BASE.items() if key != field}
    assert judge.is_valid(without) == accepted(moor, without, berth="abc")
    assert differ == list(_KNOWN_DIFFERENCES.get(field, []))


_TAKEN = "is taken"
# On the safe side: more is taken than the document promises.
_KNOWN_DIFFERENCES: dict[str, list[tuple[Any, str]]] = {
    "any_value": [(1e30, _TAKEN), (4e38, _TAKEN), (1e308, _TAKEN)],  # exact only by luck: people shall use strings
    "command": [("é" * 20, _TAKEN)],  # 40 bytes are counted in characters of four
    "berth": [(None, _TAKEN)],  # null is nothing, even for what the path gives
}


def _first(violation: Any) -> str:
    return str(violation.proto.field.elements[0].field_name)


def _request_schemas() -> list[tuple[str, str, frozenset[str]]]:
    found = {}
    for one in CONTRACT:
        for method in one.methods:
            for binding in rules_of(method):
                if binding.body == "*" and not binding.websocket and not takes_raw_body(binding):
                    path = frozenset(v.name for v in binding.template.variables)
                    name = method.input_type.name + ("Body" if path else "")
                    if name in CONTRACT_DOCUMENT["components"]["schemas"]:
                        found[name] = (name, method.input_type.full_name, path)
    return list(found.values())


def allowed(schema: Any) -> st.SearchStrategy[Any]:
    """Values that a schema of the contract's document allows, for the keywords that it uses."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name == "JsonList":
            return st.lists(st.none() | st.text("abc", max_size=3), max_size=2)
        if name.startswith("Json"):
            return st.dictionaries(
                st.text("abc", max_size=3), st.none() | st.booleans() | st.integers(-9, 9), max_size=2
            )
        return allowed(CONTRACT_DOCUMENT["components"]["schemas"][name])
    if "anyOf" in schema:
        return st.one_of([allowed(one) for one in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return st.one_of([_of_type(kind, schema) for kind in kinds])


def _of_type(kind: str, schema: Any) -> st.SearchStrategy[Any]:
    match kind:
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "integer":
            step = schema.get("multipleOf", 1)
            return st.integers(-(-schema["minimum"] // step), schema["maximum"] // step).map(lambda n: n * step)
        case "number":
            low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
            open_low = "minimum" not in schema
            return st.floats(low, high, exclude_min=open_low, exclude_max=high is None, allow_infinity=high is None)
        case "array":
            most = min(schema.get("maxItems", 3), schema.get("minItems", 0) + 3)
            return st.lists(allowed(schema["items"]), min_size=schema.get("minItems", 0), max_size=most)
        case "object" if "properties" not in schema:
            keys = _text({"maxLength": 8, **schema["propertyNames"]})
            return st.dictionaries(keys, allowed(schema["additionalProperties"]), max_size=2)
        case "object":
            properties = {name: allowed(inner) for name, inner in schema["properties"].items()}
            required = {name: properties.pop(name) for name in schema.get("required", [])}
            return st.fixed_dictionaries(required, optional=properties)
        case _:
            return _text(schema)


def _text(schema: Any) -> st.SearchStrategy[str]:
    low, high = schema.get("minLength", 0), schema.get("maxLength", 20)
    if schema.get("format") == "date-time":
        return st.datetimes().map(lambda moment: moment.isoformat() + "Z")
    if schema["pattern"] in ("^[^\\u0000]*$", "\\S"):
        letters = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
        in_bytes = any("anyOf" in one for one in schema.get("allOf", ()))
        edges = st.sampled_from(["x" * low, "x" * high, "\U0001f600" * (high // 4 if in_bytes else high)])
        return (
            st.text(letters, min_size=low, max_size=min(high, low + 20)).map(lambda t: t if t.strip() else "x") | edges
        )
    return st.from_regex(schema["pattern"].removesuffix("$") + "\\Z").filter(lambda text: low <= len(text))


@pytest.mark.parametrize(("name", "full_name", "path"), _request_schemas())
def test_what_the_document_of_the_contract_allows_passes_the_rules_of_the_contract(
    name: str, full_name: str, path: frozenset[str]
) -> None:
    cls: Any = GetMessageClass(fleet_pb2.DESCRIPTOR.pool.FindMessageTypeByName(full_name))

    @settings(max_examples=15, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(allowed({"$ref": f"#/components/schemas/{name}"}))
    def check(value: Any) -> None:
        made = CODEC.decode(cls.DESCRIPTOR, value)
        apply_defaults(made)
        broken = [v for v in protovalidate.collect_violations(made) if _first(v) not in path]
        assert not broken, (value, [v.proto for v in broken])

    check()


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 0), (0, 100), (5, 123), (-5, 17), (-300, -7), (95, 1203), (0, 2**64 - 1), (-(2**63), 2**63 - 1)],
)
def test_integer_patterns_match_just_the_integers_between(low: int, high: int) -> None:
    pattern = re.compile(integer_pattern(low, high))
    near = {edge + step for edge in (low, high, 0) for step in range(-1500, 1501)}
    assert {n for n in near if pattern.fullmatch(str(n))} == {n for n in near if low <= n <= high}
    assert not any(pattern.fullmatch(text) for text in ("", "-", "00", "01", "-0", "+1", "1.0", " 1"))
