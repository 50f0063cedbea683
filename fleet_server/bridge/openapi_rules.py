"""From protovalidate's rules of a field to JSON Schema keywords, for values as they stand in JSON requests."""

from __future__ import annotations

import re
from typing import Any, Final

from buf.validate import validate_pb2
from fleet.transcode.v1 import rules_pb2
from google.protobuf.descriptor import FieldDescriptor

from fleet_server.protojson import FieldKind, Kind, enum_names

Schema = dict[str, Any]

NO_NUL: Final = "^[^\\u0000]*$"
"""The pattern of strings without rules: NUL is never taken."""
_ASCII: Final = "^[\\u0001-\\u007f]*$"

_NUMBERS: Final = frozenset({"int32", "int64", "uint32", "uint64", "sint32", "sint64", "float", "double"}) | frozenset(
    {"fixed32", "fixed64", "sfixed32", "sfixed64"}
)
_FORMATS: Final = {
    "email": "email",
    "hostname": "hostname",
    "uri": "uri",
    "uuid": "uuid",
    "ipv4": "ipv4",
    "ipv6": "ipv6",
}
_RANGES: Final = {
    Kind.INT32: (-(1 << 31), (1 << 31) - 1),
    Kind.UINT32: (0, (1 << 32) - 1),
    Kind.INT64: (-(1 << 63), (1 << 63) - 1),
    Kind.UINT64: (0, (1 << 64) - 1),
}
_FLOAT_MAX: Final = {Kind.FLOAT: 3.4028234663852886e38, Kind.DOUBLE: 1.7976931348623157e308}
_NO_RULES: Final = validate_pb2.FieldRules()


def rules_of_field(field: FieldDescriptor) -> validate_pb2.FieldRules:
    """The field's rules; empty ones where it has none or they are switched off."""
    rules: validate_pb2.FieldRules = field.GetOptions().Extensions[validate_pb2.field]
    return _NO_RULES if rules.ignore == validate_pb2.IGNORE_ALWAYS else rules


def is_required(field: FieldDescriptor, kind: FieldKind) -> bool:
    """Whether a request must give the field: it says so, or leaving it out means a value that its rules
    refuse.
    """
    rules = rules_of_field(field)
    if rules.required:
        return True
    if kind.nullable or kind.oneof is not None or rules.ignore == validate_pb2.IGNORE_IF_ZERO_VALUE:
        return False
    return not _zero_passes(rules)


def _zero_passes(rules: validate_pb2.FieldRules) -> bool:
    name = rules.WhichOneof("type")
    if name is None:
        return True
    inner = getattr(rules, name)
    if name == "repeated":
        return not inner.min_items
    if name == "map":
        return not inner.min_pairs
    if name == "string":
        return not (inner.min_len or inner.len or inner.min_bytes) and _allows(inner, "") and _matches(inner.pattern)
    if name == "bytes":
        return not (inner.min_len or inner.len) and _allows(inner, b"")
    if name == "bool":
        return not inner.HasField("const") or inner.const is False
    if name == "enum":
        return _allows(inner, 0)
    return name not in _NUMBERS or (_allows(inner, 0) and _within(inner, 0))


def _matches(pattern: str) -> bool:
    return not pattern or re.search(pattern, "") is not None


def _allows(rules: Any, value: object) -> bool:
    if rules.HasField("const") and rules.const != value:
        return False
    return not (getattr(rules, "in") and value not in getattr(rules, "in")) and value not in rules.not_in


def _within(rules: Any, value: float) -> bool:
    low, high, above, below = (_bound(rules, name) for name in ("gte", "lte", "gt", "lt"))
    return (
        (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
        and (below is None or value < below)
    )


def _bound(rules: Any, name: str) -> Any:
    return getattr(rules, name) if rules.HasField(name) else None


def value_schema(kind: FieldKind, rules: validate_pb2.FieldRules, *, as_text: bool = False) -> Schema:
    """The schema of one scalar in a request. `as_text`: as it is written in a path or query."""
    name = rules.WhichOneof("type")
    inner = getattr(rules, name) if name is not None else None
    match kind.kind:
        case Kind.STRING:
            return _string(inner)
        case Kind.BOOL:
            return {
                "type": "boolean",
                **({"const": inner.const} if inner is not None and inner.HasField("const") else {}),
            }
        case Kind.ENUM:
            return _enum(kind, inner, as_text)
        case Kind.FLOAT | Kind.DOUBLE:
            return _float(kind.kind, inner)
        case Kind.BYTES:
            return bytes_schema()
        case _:
            return _integer(kind.kind, inner, as_text)


def bytes_schema() -> Schema:
    """Base64, standard or url-safe, padded or not."""
    char = "[A-Za-z0-9+/_-]"
    pattern = f"^(?:{char}{{4}})*(?:{char}{{2}}(?:==)?|{char}{{3}}=?)?$"
    return {"type": "string", "contentEncoding": "base64", "pattern": pattern}


def _string(rules: Any) -> Schema:
    schema: Schema = {"type": "string"}
    if rules is None:
        return {**schema, "pattern": NO_NUL}
    if rules.HasField("const"):
        return {**schema, "const": rules.const}
    if getattr(rules, "in"):
        return {**schema, "enum": list(getattr(rules, "in"))}
    low = rules.len or max(rules.min_len, 1 if rules.min_bytes else 0)
    high = rules.len or rules.max_len or rules.max_bytes
    if low:
        schema["minLength"] = low
    if high:
        schema["maxLength"] = high
    if rules.not_in:
        schema["not"] = {"enum": list(rules.not_in)}
    well_known = rules.WhichOneof("well_known")
    if well_known in _FORMATS:
        schema["format"] = _FORMATS[well_known]
    first, *rest = _patterns(rules)
    schema["pattern"] = first
    further: list[Schema] = [{"pattern": pattern} for pattern in rest]
    if rules.max_bytes:  # JSON Schema counts characters: four bytes each unless they are ASCII
        further.append({"anyOf": [{"maxLength": rules.max_bytes // 4}, {"pattern": _ASCII}]})
    return schema | ({"allOf": further} if further else {})


def _patterns(rules: Any) -> list[str]:
    """The patterns that a string must all match; NUL is refused by the last, unless the rule's own is
    anchored.
    """
    patterns = [rules.pattern] if rules.pattern else []
    if rules.prefix:
        patterns.append("^" + re.escape(rules.prefix))
    if rules.contains:
        patterns.append(re.escape(rules.contains))
    if rules.suffix:
        patterns.append(re.escape(rules.suffix) + "$")
    if not any(pattern.startswith("^") and pattern.endswith("$") for pattern in patterns):
        patterns.append(NO_NUL)
    return patterns


def _enum(kind: FieldKind, rules: Any, as_text: bool) -> Schema:
    """Words first, then what else is taken: full names and, outside of text, numbers."""
    assert kind.enum is not None
    names = enum_names(kind.enum)
    numbers = [number for number in names.words if rules is None or _allows(rules, number)]
    words = [names.words[number] for number in numbers if number or names.words[0] in names.listed]
    taken: list[str | int] = [name for name, number in names.numbers.items() if number in numbers and name not in words]
    if not as_text:
        taken += numbers
    plain: Schema = {"type": "string", "enum": words}
    return {"anyOf": [plain, {"enum": taken, "description": "Also taken: the names and numbers of the proto."}]}


def _float(kind: Kind, rules: Any) -> Schema:
    limit = _FLOAT_MAX[kind]
    schema: Schema = {"type": "number", "format": kind.value}
    schema |= _limits(rules)
    if rules is None or not (rules.HasField("gte") or rules.HasField("gt")):
        schema["minimum"] = -limit
    if rules is None or not (rules.HasField("lte") or rules.HasField("lt")):
        schema["maximum"] = limit
    return schema


def _integer(kind: Kind, rules: Any, as_text: bool) -> Schema:
    low, high = _RANGES[kind]
    schema: Schema = {"type": "integer", "format": kind.value, "minimum": low, "maximum": high, **_limits(rules)}
    if "exclusiveMinimum" in schema:
        schema["minimum"] = schema.pop("exclusiveMinimum") + 1
    if "exclusiveMaximum" in schema:
        schema["maximum"] = schema.pop("exclusiveMaximum") - 1
    if as_text or kind in (Kind.INT32, Kind.UINT32) or not schema.keys() <= {"type", "format", "minimum", "maximum"}:
        return schema
    pattern = integer_pattern(schema["minimum"], schema["maximum"])
    return {
        "anyOf": [schema, {"type": "string", "pattern": pattern, "description": "Digits, for numbers beyond 2^53."}]
    }


def _limits(rules: Any) -> Schema:
    if rules is None:
        return {}
    schema: Schema = {}
    for rule, keyword in (
        ("gte", "minimum"),
        ("lte", "maximum"),
        ("gt", "exclusiveMinimum"),
        ("lt", "exclusiveMaximum"),
        ("const", "const"),
    ):
        if rules.HasField(rule):
            schema[keyword] = getattr(rules, rule)
    if getattr(rules, "in"):
        schema["enum"] = list(getattr(rules, "in"))
    if rules.not_in:
        schema["not"] = {"enum": list(rules.not_in)}
    if isinstance(rules, validate_pb2.Int32Rules) and rules.HasExtension(rules_pb2.multiple_of):
        schema["multipleOf"] = rules.Extensions[rules_pb2.multiple_of]
    return schema


def integer_pattern(low: int, high: int) -> str:
    """A regular expression of the decimal integers from `low` to `high`, without leading zeros."""
    parts = []
    if low < 0:
        parts.append("-(?:" + "|".join(_natural(max(1, -high), -low)) + ")")
    if high >= 0:
        parts += _natural(max(0, low), high)
    return f"^(?:{'|'.join(parts)})$"


def _natural(low: int, high: int) -> list[str]:
    """Alternatives that together match the natural numbers from `low` to `high`."""
    if low > high:
        return []
    if low == 0:
        return ["0", *_natural(1, high)]
    digits, most = len(str(low)), len(str(high + 1)) - 1
    if low == 10 ** (digits - 1) and most > digits:  # whole blocks of lengths at once
        return [f"[1-9][0-9]{{{digits - 1},{most - 1}}}", *_natural(10**most, high)]
    edge = min(10**digits - 1, high)
    return [*_same_length(str(low), str(edge)), *_natural(edge + 1, high)]


def _same_length(low: str, high: str) -> list[str]:
    if not low:
        return [""]
    rest = len(low) - 1
    if low[1:] == "0" * rest and high[1:] == "9" * rest:
        first = low[0] if low[0] == high[0] else f"[{low[0]}-{high[0]}]"
        return [first + (f"[0-9]{{{rest}}}" if rest else "")]
    if low[0] == high[0]:
        return [low[0] + part for part in _same_length(low[1:], high[1:])]
    parts = [low[0] + part for part in _same_length(low[1:], "9" * rest)]
    if int(high[0]) - int(low[0]) > 1:
        parts += _same_length(str(int(low[0]) + 1) + "0" * rest, str(int(high[0]) - 1) + "9" * rest)
    return parts + [high[0] + part for part in _same_length("0" * rest, high[1:])]
