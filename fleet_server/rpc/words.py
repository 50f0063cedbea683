"""Says in words what a field must be, from its protovalidate rules: "must be a multiple of 8, from 64 to 2048"."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from buf.validate import validate_pb2
from fleet.transcode.v1 import rules_pb2
from google.protobuf.descriptor import FieldDescriptor

from fleet_server.protojson import enum_words

_NUMBERS = ("int32", "int64", "uint32", "uint64", "float", "double")


@lru_cache(maxsize=4096)
def requirement(field: FieldDescriptor) -> str:
    """What `field` must be, as a phrase that follows its name; "" where it has no rules."""
    rules = field.GetOptions().Extensions[validate_pb2.field]
    if field.is_repeated:
        return _repeated(field, rules)
    return _single(field, rules)


def _single(field: FieldDescriptor, rules: validate_pb2.FieldRules) -> str:
    kind = rules.WhichOneof("type")
    phrases = []
    if kind == "string":
        phrases.append(_string(rules.string))
    elif kind == "enum" and field.enum_type is not None:
        phrases.append("must be one of " + ", ".join(enum_words(field.enum_type)))
    elif kind in _NUMBERS:
        phrases.append(_number(getattr(rules, kind)))
    phrases += [cel.message for cel in rules.cel if cel.message]
    if rules.required and not any(phrases):
        phrases.append("is required")
    return ", ".join(phrase for phrase in phrases if phrase)


def _repeated(field: FieldDescriptor, rules: validate_pb2.FieldRules) -> str:
    if rules.WhichOneof("type") == "map":
        return f"must have at most {rules.map.max_pairs:,} entries"
    low, high = rules.repeated.min_items, rules.repeated.max_items
    items = _single(field, rules.repeated.items) if rules.repeated.HasField("items") else ""
    count = ""
    if low and high:
        count = f"must have {low:,} to {high:,} entries"
    elif high:
        count = f"must have at most {high:,} entries"
    elif low:
        count = f"must have at least {low:,} entries"
    return "; each ".join(phrase for phrase in (count, items) if phrase)


def _number(rules: Any) -> str:
    low, above = _bound(rules, "gte"), _bound(rules, "gt")
    high, below = _bound(rules, "lte"), _bound(rules, "lt")
    step = 0
    if isinstance(rules, validate_pb2.Int32Rules):
        step = rules.Extensions[rules_pb2.multiple_of]
    span = ""
    if low and high:
        span = f"from {low} to {high}"
    elif low or above:
        span = f"at least {low}" if low else f"above {above}"
        if high or below:
            span += f" and at most {high}" if high else f" and below {below}"
    elif high or below:
        span = f"at most {high}" if high else f"below {below}"
    if step:
        return f"must be a multiple of {step}" + (f", {span}" if span else "")
    return f"must be {span}" if span else "must be a finite number"


def _bound(rules: Any, name: str) -> str:
    if not rules.HasField(name):
        return ""
    value = getattr(rules, name)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _string(rules: validate_pb2.StringRules) -> str:
    if getattr(rules, "in"):
        return "must be one of " + ", ".join(getattr(rules, "in"))
    low, high = rules.min_len, rules.max_len
    if rules.pattern == r"\S":
        return f"must have {low:,} to {high:,} characters and not be blank"
    if rules.pattern:
        return f"must match {rules.pattern}"
    if rules.max_bytes:
        return f"must have {max(low, rules.min_bytes):,} to {rules.max_bytes:,} bytes"
    if low and high:
        return f"must have {low:,} to {high:,} characters"
    if high:
        return f"must have at most {high:,} characters"
    return "must not be empty" if low else ""
