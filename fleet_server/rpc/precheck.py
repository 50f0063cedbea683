"""A quick look at a message: does it surely keep the rules of its proto?

protovalidate converts a message before it judges it, which costs tens of microseconds where a Struct rides along.
Nearly every message is good, and to see that by the standard rules takes a few comparisons: they are compiled from the
descriptors. Only a sure yes counts. What is not known here (CEL, formats such as uri, patterns that two engines might
read differently) makes the answer no for messages that set such a field, and protovalidate decides, as it does for
everything that breaks a rule.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

from buf.validate import validate_pb2
from fleet.transcode.v1 import rules_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from fleet_server.protojson.source import Source, attribute, indented

Check = Callable[[Any], bool]

_NUMBERS = {
    FieldDescriptor.TYPE_INT32: "int32",
    FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_UINT64: "uint64",
    FieldDescriptor.TYPE_FLOAT: "float",
    FieldDescriptor.TYPE_DOUBLE: "double",
}
_KINDS = {
    **_NUMBERS,
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_BYTES: "bytes",
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_ENUM: "enum",
}
_COMPARED = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
_SIZES = {
    "len": "len(v) == {}",
    "min_len": "len(v) >= {}",
    "max_len": "len(v) <= {}",
    "min_bytes": "len(v.encode()) >= {}",
    "max_bytes": "len(v.encode()) <= {}",
}

# What RE2 and `re` read alike: characters, plain classes, one repetition of each, anchors at the ends. No groups and at
# most one repetition without an end, so that no text makes `re` try for long. RE2's \s lacks the vertical tab, so \s is
# left out and \S stands outside classes alone.
_CLASS = r"\[\^?(?:[A-Za-z0-9 _.,:;!~@#%&=<>/'\"+*?(){}|$-]|\\[][dw.\\^/-])+\]"
_ONE = rf"(?:[A-Za-z0-9 _,:;!~@#%&=<>/'\"-]|\.|\\[dwDWS]|\\[.\\/+*?()|{{}}^$\[\]-]|{_CLASS})"
_BOUNDED = r"(?:\{[0-9]{1,4}(?:,[0-9]{1,4})?\}|\?)"
_OPEN = r"(?:\*|\+|\{[0-9]{1,4},\})"
_ALIKE = re.compile(rf"\^?(?:{_ONE}{_BOUNDED}?)*(?:{_ONE}{_OPEN})?(?:{_ONE}{_BOUNDED}?)*\$?")

_lock = threading.RLock()
_checks: dict[Descriptor, Check] = {}
_needed: dict[Descriptor, bool] = {}


class _UnknownRuleError(Exception):
    """A rule that is not judged here."""


def surely_valid(message: Message) -> bool:
    """Whether the message keeps every rule of its type and of all inside it; False where that is not sure."""
    descriptor: Any = message.DESCRIPTOR
    check = _checks.get(descriptor)
    return (check or _compile(descriptor))(message)


def _compile(message: Descriptor) -> Check:
    with _lock:
        tree = [m for m in _reached(message) if m not in _checks]
        # Names first: messages may hold each other. Published together, for no thread may meet half of them.
        names = {m: _source.reserve("valid") for m in tree}
        _names.update(names)
        _checks.update({m: _source.define(names[m], "m", _body(m)) for m in tree})
        return _checks[message]


_names: dict[Descriptor, str] = {}
_source = Source()


def _reached(message: Descriptor) -> list[Descriptor]:
    found = [message]
    for each in found:
        found += [f.message_type for f in each.fields if f.message_type is not None and f.message_type not in found]
    return list(dict.fromkeys(found))


def _has_rules(message: Descriptor) -> bool:
    """Whether the message, or anything inside it, has a rule."""
    known = _needed.get(message)
    if known is None:
        known = _needed[message] = any(
            m.GetOptions().HasExtension(validate_pb2.message)
            or any(oneof.GetOptions().HasExtension(validate_pb2.oneof) for oneof in m.oneofs)
            or any(field.GetOptions().HasExtension(validate_pb2.field) for field in m.fields)
            for m in _reached(message)
        )
    return known


def _body(message: Descriptor) -> list[str]:
    if message.GetOptions().HasExtension(validate_pb2.message):
        return ["return False"]
    lines: list[str] = []
    for oneof in message.oneofs:
        given = oneof.GetOptions().Extensions[validate_pb2.oneof]
        if given.ListFields():
            only_required = [name.name for name, _ in given.ListFields()] == ["required"]
            lines += _unless(f"m.WhichOneof({oneof.name!r})" if only_required else "False")
    for field in message.fields:
        rules = field.GetOptions().Extensions[validate_pb2.field]
        lines += _field(field, rules)
    asked = any("h('" in line for line in lines)
    return [*(["h = m.HasField"] if asked else []), *lines, "return True"]


def _unless(condition: str) -> list[str]:
    return [f"if not ({condition}):", "    return False"]


def _field(field: FieldDescriptor, rules: validate_pb2.FieldRules) -> list[str]:
    read = attribute(field.name)
    try:
        judged = _judged(field, rules)
    except _UnknownRuleError:
        judged = ["return False"]
    lines = [f"v = {read}", *judged] if judged else []
    if field.has_presence:
        lines = [f"if h({field.name!r}):", *indented(lines)] if lines else []
        return [*_unless(f"h({field.name!r})"), *lines] if rules.required else lines
    if field.is_repeated and judged == ["return False"]:
        lines = [f"if {read}:", "    return False"]
    return [*_unless(read), *lines] if rules.required else lines


def _judged(field: FieldDescriptor, rules: validate_pb2.FieldRules) -> list[str]:
    """Lines that return False unless the value v keeps the rules. Raises _UnknownRuleError."""
    kind = _kind_of(rules)
    given: Any = getattr(rules, kind) if kind else None
    if field.is_repeated and field.message_type is not None and field.message_type.GetOptions().map_entry:
        return _map(field.message_type, kind, given)
    if field.is_repeated:
        return _repeated(field, kind, given)
    if field.message_type is not None:
        if kind:
            raise _UnknownRuleError
        return _inner(field.message_type, "v")
    return _scalar(field, kind, given)


def _kind_of(rules: validate_pb2.FieldRules) -> str:
    """The member of the rules' oneof, "" for none. Raises _UnknownRuleError for anything else but `required`."""
    names = {field.name for field, _ in rules.ListFields()} - {"required"}
    kind = rules.WhichOneof("type") or ""
    if names - {kind} or len(UnknownFieldSet(rules)):
        raise _UnknownRuleError
    return kind


def _inner(message: Descriptor, value: str) -> list[str]:
    return _unless(f"{_names[message]}({value})") if _has_rules(message) else []


def _repeated(field: FieldDescriptor, kind: str, rules: Any) -> list[str]:
    lines: list[str] = []
    each: list[str] = _inner(field.message_type, "v") if field.message_type is not None else []
    for name, value in _listed(rules, kind, "repeated"):
        if name == "min_items":
            lines += _unless(f"len(v) >= {value}")
        elif name == "max_items":
            lines += _unless(f"len(v) <= {value}")
        elif name == "items" and field.message_type is None:
            each = _element(field, value)
        else:
            raise _UnknownRuleError
    return lines + (["for v in v:", *indented(each)] if each else [])


def _map(entry: Descriptor, kind: str, rules: Any) -> list[str]:
    key, value = entry.fields_by_name["key"], entry.fields_by_name["value"]
    lines: list[str] = []
    keys: list[str] = []
    values: list[str] = _inner(value.message_type, "v") if value.message_type is not None else []
    for name, given in _listed(rules, kind, "map"):
        if name == "min_pairs":
            lines += _unless(f"len(v) >= {given}")
        elif name == "max_pairs":
            lines += _unless(f"len(v) <= {given}")
        elif name == "keys":
            keys = _element(key, given)
        elif name == "values" and value.message_type is None:
            values = _element(value, given)
        else:
            raise _UnknownRuleError
    if keys or values:
        lines += ["whole = v", "for k in whole:", *indented(["v = k", *keys] if keys else [])]
        lines += indented(["v = whole[k]", *values] if values else [])
    return lines


def _element(field: FieldDescriptor, rules: validate_pb2.FieldRules) -> list[str]:
    if rules.HasField("required"):
        raise _UnknownRuleError
    kind = _kind_of(rules)
    return _scalar(field, kind, getattr(rules, kind) if kind else None)


def _scalar(field: FieldDescriptor, kind: str, rules: Any) -> list[str]:
    if not kind:
        return []
    listed = _listed(rules, kind, _KINDS.get(field.type, "none"))
    conditions = []
    given = dict(listed)
    low, high = given.get("gte", given.get("gt")), given.get("lte", given.get("lt"))
    if low is not None and high is not None and not low <= high:
        raise _UnknownRuleError  # the range outside
    for name, value in listed:
        if kind in _NUMBERS.values() and name in _COMPARED:
            conditions.append(f"v {_COMPARED[name]} {_source.add('bound', value)}")
        elif name == "finite" and kind in ("float", "double"):
            conditions += ["v - v == 0"] if value else []
        elif name == "multiple_of" and kind == "int32" and value > 0:
            conditions.append(f"v % {value} == 0")
        elif name in _SIZES and (kind == "string" or (kind == "bytes" and name.endswith("len"))):
            conditions.append(_SIZES[name].format(value))
        elif name == "pattern" and kind == "string":
            conditions.append(f"{_source.add('search', _compiled(value).search)}(v)")
        elif name == "defined_only" and field.enum_type is not None:
            numbers = frozenset(each.number for each in field.enum_type.values)
            conditions += [f"v in {_source.add('numbers', numbers)}"] if value else []
        elif name == "const" and kind in ("string", "bool", "enum", "int32", "int64"):
            conditions.append(f"v == {_source.add('constant', value)}")
        elif name in ("in", "not_in") and kind in ("string", "enum", "int32", "int64"):
            conditions.append(f"v {name.replace('_', ' ')} {_source.add('values', frozenset(value))}")
        else:
            raise _UnknownRuleError
    return _unless(" and ".join(conditions)) if conditions else []


def _listed(rules: Any, kind: str, expected: str) -> list[tuple[str, Any]]:
    """The rules that are set, by name; raises _UnknownRuleError where they are not of that kind or not all known."""
    if not kind:
        return []
    if kind != expected or len(UnknownFieldSet(rules)):
        raise _UnknownRuleError
    listed = []
    for field, value in rules.ListFields():
        if field.is_extension and field.full_name != rules_pb2.DESCRIPTOR.extensions_by_name["multiple_of"].full_name:
            raise _UnknownRuleError
        listed.append((field.name, value))
    return listed


def _compiled(pattern: str) -> re.Pattern[str]:
    if not _ALIKE.fullmatch(pattern):
        raise _UnknownRuleError
    ends = pattern.endswith("$") and not pattern.endswith("\\$")
    return re.compile(pattern[:-1] + r"\Z" if ends else pattern, re.ASCII)
