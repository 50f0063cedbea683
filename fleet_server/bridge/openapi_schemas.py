"""JSON Schemas of messages: one form for requests, where limits and leaving out matter, one for replies,
where all is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from buf.validate import validate_pb2
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from fleet_server.bridge.openapi_rules import (
    NO_NUL,
    Schema,
    integer_pattern,
    is_required,
    rules_of_field,
    value_schema,
)
from fleet_server.protojson import FieldKind, Kind, default_of, enum_words, field_kind, tagged_oneof

_SAFE: Final = 1 << 53
_MAX_PAIRWISE: Final = 8
_HOUR: Final = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIMESTAMP: Final = (
    "^(?!0000)[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])T" + _HOUR + ":[0-5][0-9]"
    "(?:\\.[0-9]{1,9})?(?:Z|[+-]" + _HOUR + ")$"
)
_ZERO: Final[Mapping[Kind, object]] = {
    **dict.fromkeys((Kind.INT32, Kind.UINT32, Kind.INT64, Kind.UINT64, Kind.FLOAT, Kind.DOUBLE), 0),
    Kind.STRING: "",
    Kind.BYTES: "",
    Kind.BOOL: False,
}


class SchemaBuilder:
    """Collects the components that the operations refer to.

    A message that appears on both sides has two components, the request's with the suffix `Input`; a
    request less the fields that its path gives has the suffix `Body`. Names are full names less `package`.
    `comments` describe; `variants` name, for a free-object field by full name, the messages that it may
    hold.
    """

    def __init__(
        self,
        package: str,
        comments: Mapping[str, str],
        variants: Mapping[str, Sequence[Descriptor]],
        replies: Iterable[Descriptor],
    ) -> None:
        self._prefix = f"{package}." if package else ""
        self._comments = comments
        self._variants = variants
        self._replies = frozenset(message.full_name for message in replies)
        self.components: dict[str, Schema] = {}

    def described(self, schema: Schema, full_name: str) -> Schema:
        """`schema` with the comment of what it is, where there is one."""
        text = self._comments.get(full_name)
        return {**schema, "description": text} if text else schema

    # Replies.

    def reply(self, message: Descriptor) -> Schema:
        """A reference to the message as it is printed."""
        if message.full_name in _WELL_KNOWN:
            return self._known(_WELL_KNOWN[message.full_name])
        if message.file.name == _WRAPPERS:
            return self._reply_value(field_kind(message.fields_by_name["value"]))
        name = self._name(message)
        if name not in self.components:
            self.components[name] = {}  # stands for itself inside itself
            self.components[name] = self._reply_object(message)
        return _ref(name)

    def reply_field(self, field: FieldDescriptor) -> Schema:
        """The value of a field as it is printed."""
        kind = field_kind(field)
        one = self._reply_value(kind)
        if kind.map_key is not None:
            one = {"type": "object", "additionalProperties": one}
        elif kind.repeated:
            one = {"type": "array", "items": one}
        elif kind.nullable:
            one = _nullable(one)
        return self.described(one, field.full_name)

    def _reply_object(self, message: Descriptor) -> Schema:
        tagged = tagged_oneof(message)
        properties: dict[str, Schema] = {}
        required: list[str] = []
        for field in message.fields:
            oneof = field_kind(field).oneof
            if tagged is not None and oneof is tagged:
                continue
            properties[field.name] = self.reply_field(field)
            if oneof is None:
                required.append(field.name)
        schema: Schema = {"type": "object", "properties": properties, "required": required}
        if tagged is not None:
            properties["type"] = {"type": "string", "enum": [field.name for field in tagged.fields]}
            properties["data"] = {}
            required += ["type", "data"]
            schema["oneOf"] = [self._tagged(field) for field in tagged.fields]
        return self.described(schema, message.full_name)

    def _tagged(self, field: FieldDescriptor) -> Schema:
        data = {key: value for key, value in self.reply_field(field).items() if key != "description"}
        return self.described({"properties": {"type": {"const": field.name}, "data": data}}, field.full_name)

    def _reply_value(self, kind: FieldKind) -> Schema:
        if kind.kind is Kind.MESSAGE and kind.message is not None:
            return self.reply(kind.message)
        if kind.enum is not None and kind.kind is Kind.ENUM:
            return self._enum(kind.enum)
        match kind.kind:
            case Kind.INT64 | Kind.UINT64:
                return {"type": ["integer", "string"], "format": kind.kind.value}
            case Kind.INT32 | Kind.UINT32:
                return {"type": "integer", "format": kind.kind.value}
            case Kind.FLOAT | Kind.DOUBLE:
                return {"type": "number", "format": kind.kind.value}
            case Kind.BOOL:
                return {"type": "boolean"}
            case Kind.STRING:
                return {"type": "string"}
            case Kind.BYTES:
                return {"type": "string", "contentEncoding": "base64"}
            case _:
                return self._known(kind.kind)

    def _enum(self, enum: EnumDescriptor) -> Schema:
        name = self._name(enum)
        if name not in self.components:
            words = enum_words(enum)
            self.components[name] = self.described({"type": "string", "enum": list(words)}, enum.full_name)
        return _ref(name)

    # Requests.

    def request(self, message: Descriptor, without: frozenset[str] = frozenset()) -> Schema:
        """A reference to the message as it may be sent, less the fields in `without`."""
        if message.full_name in _WELL_KNOWN:
            return self._known(_WELL_KNOWN[message.full_name], sent=True)
        if message.file.name == _WRAPPERS:
            return self._request_value(field_kind(message.fields_by_name["value"]), validate_pb2.FieldRules())
        name = self._name(message)
        name += "Input" if message.full_name in self._replies else ""
        name += "Body" if without else ""
        if name not in self.components:
            self.components[name] = {}
            self.components[name] = self._request_object(message, without)
        return _ref(name)

    def request_field(self, field: FieldDescriptor) -> Schema:
        """The value of a field as it may be sent, null where that means leaving it out."""
        kind = field_kind(field)
        rules = rules_of_field(field)
        if kind.map_key is not None:
            schema = self._request_map(kind, rules.map)
        elif kind.repeated:
            schema = self._request_list(kind, rules.repeated)
        else:
            schema = self._request_value(kind, rules, field.full_name)
        if not is_required(field, kind):
            schema = _nullable(schema) | self.default(field, kind)
        texts = [self._comments.get(field.full_name, ""), *(cel.message for cel in rules.cel)]
        text = " ".join(text for text in texts if text)
        return {**schema, "description": text} if text else schema

    def default(self, field: FieldDescriptor, kind: FieldKind) -> Schema:
        """The keyword `default` of a field that may be left out, where what it then means is known."""
        if is_required(field, kind):
            return {}
        default = default_of(field)
        if default is None and not kind.nullable and kind.oneof is None and not kind.repeated and kind.map_key is None:
            default = _ZERO.get(kind.kind)  # type: ignore[assignment]
        return {} if default is None else {"default": default}

    def is_body_required(self, message: Descriptor, without: frozenset[str] = frozenset()) -> bool:
        """Whether `{}` (no body is as good) would be refused."""
        if message.full_name in _WELL_KNOWN or message.file.name == _WRAPPERS:
            return message.full_name != "google.protobuf.Struct"
        return any(is_required(field, field_kind(field)) for field in message.fields if field.name not in without)

    def _request_object(self, message: Descriptor, without: frozenset[str]) -> Schema:
        fields = [field for field in message.fields if field.name not in without]
        tagged = tagged_oneof(message)
        plain = [field for field in fields if tagged is None or field_kind(field).oneof is not tagged]
        schema: Schema = {
            "type": "object",
            "properties": {field.name: self.request_field(field) for field in plain},
            "additionalProperties": False,
        }
        if tagged is not None:
            schema["properties"] |= {"type": {"enum": [field.name for field in tagged.fields]}, "data": {}}
        required = [field.name for field in plain if is_required(field, field_kind(field))]
        if required:
            schema["required"] = required
        limits = [limit for oneof in message.oneofs for limit in _oneof_limits(oneof, plain)]
        if limits:
            schema["allOf"] = limits
        rules = message.GetOptions().Extensions[validate_pb2.message]
        texts = [self._comments.get(message.full_name, ""), *(cel.message for cel in rules.cel)]
        text = " ".join(text for text in texts if text)
        return {**schema, "description": text} if text else schema

    def _request_map(self, kind: FieldKind, rules: validate_pb2.MapRules) -> Schema:
        assert kind.map_key is not None
        values = self._request_value(FieldKind(**{**_fields(kind), "map_key": None}), rules.values)
        keys = value_schema(FieldKind(kind.map_key), rules.keys)
        if kind.map_key is not Kind.STRING:
            keys = {"pattern": integer_pattern(keys["minimum"], keys["maximum"])} if "minimum" in keys else {}
            keys = keys or {"enum": ["true", "false"]}
        keys = {key: value for key, value in keys.items() if key != "type"}
        schema: Schema = {"type": "object", "additionalProperties": _nullable(values), "propertyNames": keys}
        return schema | _counts(rules.min_pairs, rules.max_pairs, "Properties")

    def _request_list(self, kind: FieldKind, rules: validate_pb2.RepeatedRules) -> Schema:
        items = self._request_value(FieldKind(**{**_fields(kind), "repeated": False}), rules.items)
        schema: Schema = {"type": "array", "items": items, **_counts(rules.min_items, rules.max_items, "Items")}
        return {**schema, "uniqueItems": True} if rules.unique else schema

    def _request_value(self, kind: FieldKind, rules: validate_pb2.FieldRules, full_name: str = "") -> Schema:
        if kind.kind is Kind.MESSAGE and kind.message is not None:
            return self.request(kind.message)
        if full_name in self._variants:
            return {
                "anyOf": [self.request(message) for message in self._variants[full_name]]
                + [self._known(Kind.STRUCT, sent=True)]
            }
        if kind.kind in _KNOWN_KINDS:
            return self._known(kind.kind, sent=True)
        return value_schema(kind, rules)

    # Both.

    def _known(self, kind: Kind, *, sent: bool = False) -> Schema:
        match kind:
            case Kind.TIMESTAMP:
                schema: Schema = {"type": "string", "format": "date-time"}
                return {**schema, "pattern": _TIMESTAMP} if sent else schema
            case Kind.DURATION:
                return {"type": "string", "pattern": "^-?[0-9]{1,11}(?:\\.[0-9]{1,9})?s$"}
            case Kind.FIELD_MASK:
                return {"type": "string", "pattern": "^(?:[a-z_][a-z0-9_]*(?:[.,][a-z_][a-z0-9_]*)*)?$"}
            case Kind.NULL:
                return {"type": "null"}
            case Kind.ANY:
                return {"type": "object", "properties": {"@type": {"type": "string"}}}
            case Kind.STRUCT:
                return self._json("JsonObject")
            case Kind.LIST_VALUE:
                return self._json("JsonList")
            case _:
                return self._json("JsonValue")

    def _json(self, name: str) -> Schema:
        """Free JSON. Numbers are doubles: what lies beyond 2^53 is a string."""
        value = _ref("JsonValue")
        number = {"type": "number", "minimum": -_SAFE, "maximum": _SAFE}
        text = {"type": "string", "pattern": NO_NUL}
        entries: Schema = {"type": "object", "additionalProperties": value, "propertyNames": {"pattern": NO_NUL}}
        self.components |= {
            "JsonObject": {**entries, "description": "Any JSON object."},
            "JsonList": {"type": "array", "items": value, "description": "Any JSON list."},
            "JsonValue": {
                "anyOf": [{"type": ["null", "boolean"]}, number, text, _ref("JsonObject"), _ref("JsonList")],
                "description": "Any JSON value; integers beyond 2^53 as strings.",
            },
        }
        return _ref(name)

    def _name(self, what: Descriptor | EnumDescriptor) -> str:
        return what.full_name.removeprefix(self._prefix).replace(".", "_")


_WELL_KNOWN: Final = {
    "google.protobuf.Timestamp": Kind.TIMESTAMP,
    "google.protobuf.Duration": Kind.DURATION,
    "google.protobuf.FieldMask": Kind.FIELD_MASK,
    "google.protobuf.Any": Kind.ANY,
    "google.protobuf.Struct": Kind.STRUCT,
    "google.protobuf.Value": Kind.VALUE,
    "google.protobuf.ListValue": Kind.LIST_VALUE,
}
_WRAPPERS: Final = "google/protobuf/wrappers.proto"
_KNOWN_KINDS: Final = frozenset({*_WELL_KNOWN.values(), Kind.NULL})


def _fields(kind: FieldKind) -> dict[str, Any]:
    return {name: getattr(kind, name) for name in FieldKind.__dataclass_fields__}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _counts(low: int, high: int, what: str) -> Schema:
    return ({f"min{what}": low} if low else {}) | ({f"max{what}": high} if high else {})


def _nullable(schema: Schema) -> Schema:
    """`schema`, or null."""
    if isinstance(schema.get("type"), str) and not schema.keys() & {"enum", "const"}:
        return {**schema, "type": [schema["type"], "null"]}
    if isinstance(schema.get("type"), list):
        return {**schema, "type": [*schema["type"], *(["null"] if "null" not in schema["type"] else [])]}
    if schema.keys() == {"anyOf"}:
        return {"anyOf": [*schema["anyOf"], {"type": "null"}]}
    return {"anyOf": [schema, {"type": "null"}]}


def _given(name: str) -> Schema:
    return {"required": [name], "properties": {name: {"not": {"type": "null"}}}}


def _oneof_limits(oneof: Any, fields: Sequence[FieldDescriptor]) -> list[Schema]:
    """At most one member; exactly one where the oneof is required."""
    names = [field.name for field in fields if field_kind(field).oneof is oneof]
    limits: list[Schema] = []
    if 1 < len(names) <= _MAX_PAIRWISE:
        pairs = [(one, other) for index, one in enumerate(names) for other in names[index + 1 :]]
        limits += [{"not": {"allOf": [_given(one), _given(other)]}} for one, other in pairs]
    if names and oneof.GetOptions().Extensions[validate_pb2.oneof].required:
        limits.append({"anyOf": [_given(name) for name in names]})
    return limits
