"""Where our JSON differs from json_format's, as code: the table is in test_differential.py.

`expected` turns what json_format prints into what we must print. `for_json_format` turns our JSON into what json_format
reads. `stricter` names each listed reason for which we refuse a value that json_format may take.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from fleet.transcode.v1 import options_pb2
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

Json = Any
SAFE = 2**53
FLOAT_MAX = 3.4028234663852886e38
F = FieldDescriptor
WIDE = {F.TYPE_INT64, F.TYPE_SINT64, F.TYPE_SFIXED64, F.TYPE_UINT64, F.TYPE_FIXED64}
NARROW = {F.TYPE_INT32, F.TYPE_SINT32, F.TYPE_SFIXED32, F.TYPE_UINT32, F.TYPE_FIXED32}
FLOATS = {F.TYPE_FLOAT, F.TYPE_DOUBLE}
FREE = {f"google.protobuf.{name}" for name in ("Struct", "Value", "ListValue")}
TEXTS = {f"google.protobuf.{name}" for name in ("Timestamp", "Duration", "FieldMask")}
SPECIAL = FREE | TEXTS | {"google.protobuf.Any"}

# What the rule of the short word does not tell by itself.
ODD_WORDS = {"GPU_KIND_UNKNOWN": "unknown", "GPUKIND_AGX": "agx", "Thor": "thor", "GPU": "gpu"}

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)", re.ASCII)
LENGTH = re.compile(r"-?\d{1,12}(\.\d{1,9})?s", re.ASCII)
MASK = re.compile(r"([a-z_][a-z0-9_]*([.,][a-z_][a-z0-9_]*)*)?")
DIGITS = re.compile(r"-?\d{1,20}", re.ASCII)
BASE64 = re.compile(r"([A-Za-z0-9+/_-]{4})*([A-Za-z0-9+/_-]{2}(==)?|[A-Za-z0-9+/_-]{3}=?)?")


def is_wrapper(message: Descriptor) -> bool:
    return message.file.name == "google/protobuf/wrappers.proto"


def is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def oneof_of(field: FieldDescriptor) -> str | None:
    """The name of the real oneof; the hidden ones of optional fields are called by their field."""
    oneof = field.containing_oneof
    return None if oneof is None or oneof.name == f"_{field.name}" else oneof.name


def tag_of(message: Descriptor) -> str:
    return message.GetOptions().Extensions[options_pb2.message].tagged_oneof


def word_of(enum: EnumDescriptor, name: str) -> str:
    prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enum.name).upper() + "_"
    return ODD_WORDS.get(name, name.removeprefix(prefix).lower())


def names_by_word(enum: EnumDescriptor) -> dict[str, str]:
    return {word_of(enum, value.name): value.name for value in enum.values}


# --- out


def expected(message: Descriptor, js: Json) -> Json:
    """What we must print, from what json_format printed."""
    name = message.full_name
    if is_wrapper(message):
        return _scalar_out(message.fields_by_name["value"], js)
    if name in FREE:
        return _free_out(js)
    if name == "google.protobuf.FieldMask":
        return re.sub("[A-Z]", lambda match: "_" + match[0].lower(), js)
    if name in TEXTS:
        return js
    if name == "google.protobuf.Any":
        return _any_out(js)
    out: dict[str, Json] = {}
    tag = tag_of(message)
    if tag:
        out |= {"type": None, "data": None}
    for field in message.fields:
        oneof = oneof_of(field)
        if field.name not in js:
            if oneof is None:
                out[field.name] = None
            continue
        value = _field_out(field, js[field.name])
        if tag and oneof == tag:
            out |= {"type": field.name, "data": value}
        else:
            out[field.name] = value
    return out


def _field_out(field: FieldDescriptor, js: Json) -> Json:
    if is_map(field):
        assert field.message_type is not None
        value = field.message_type.fields_by_name["value"]
        return {key: _one_out(value, item) for key, item in js.items()}
    return [_one_out(field, item) for item in js] if field.is_repeated else _one_out(field, js)


def _one_out(field: FieldDescriptor, js: Json) -> Json:
    return expected(field.message_type, js) if field.message_type is not None else _scalar_out(field, js)


def _scalar_out(field: FieldDescriptor, js: Json) -> Json:
    if field.enum_type is not None and isinstance(js, str):
        return word_of(field.enum_type, js)
    if field.type == F.TYPE_FLOAT and isinstance(js, float) and abs(js) > FLOAT_MAX:
        return FLOAT_MAX if js > 0 else -FLOAT_MAX
    if field.type in WIDE and isinstance(js, str):
        return int(js) if -SAFE <= int(js) <= SAFE else js
    return js


def _free_out(js: Json) -> Json:
    if isinstance(js, dict):
        return {key: _free_out(item) for key, item in js.items()}
    if isinstance(js, list):
        return [_free_out(item) for item in js]
    return int(js) if isinstance(js, float) and js.is_integer() and -SAFE <= js <= SAFE else js


def _any_out(js: Json) -> Json:
    if not js:
        return {}
    inner = descriptor_pool.Default().FindMessageTypeByName(js["@type"].split("/")[-1])
    if is_wrapper(inner) or inner.full_name in SPECIAL:
        return {"@type": js["@type"], "value": expected(inner, js["value"])}
    return {"@type": js["@type"], **expected(inner, {k: v for k, v in js.items() if k != "@type"})}


# --- in


def for_json_format(message: Descriptor, js: Json) -> Json:
    """Our JSON in json_format's words; what has no meaning for us is left as it is."""
    name = message.full_name
    if name == "google.protobuf.FieldMask" and isinstance(js, str):
        return re.sub("_([a-z])", lambda match: match[1].upper(), js)
    if is_wrapper(message) or name in FREE or name in TEXTS or not isinstance(js, dict):
        return js
    if name == "google.protobuf.Any":
        return _any_in(js)
    out: dict[str, Json] = {}
    tag = tag_of(message)
    for key, value in js.items():
        field = message.fields_by_name.get(key)
        if tag and (key in ("type", "data") or (field is not None and oneof_of(field) == tag)):
            continue
        if field is None or (value is None and not field.is_repeated):
            out[key] = value
        elif value is None:
            continue
        else:
            out[key] = _field_in(field, value)
    if tag:
        out |= _tagged_in(message, tag, js)
    return out


def _tagged_in(message: Descriptor, tag: str, js: dict[str, Json]) -> dict[str, Json]:
    members = {field.name: field for field in message.oneofs_by_name[tag].fields}
    word, data = js.get("type"), js.get("data")
    refused = {"no such field": 1}
    if members.keys() & js.keys() - {"data", "type"}:
        return refused
    if word is None:
        return {} if data is None else refused
    if not isinstance(word, str) or word not in members:
        return refused
    field = members[word]
    if data is None:
        return {word: {}} if field.message_type is not None else refused
    return {word: _field_in(field, data)}


def _field_in(field: FieldDescriptor, js: Json) -> Json:
    if is_map(field):
        assert field.message_type is not None
        value = field.message_type.fields_by_name["value"]
        if not isinstance(js, dict):
            return js
        free = value.message_type is not None and value.message_type.full_name == "google.protobuf.Value"
        return {key: _one_in(value, item) for key, item in js.items() if item is not None or free}
    if field.is_repeated:
        return [_one_in(field, item) for item in js] if isinstance(js, list) else js
    return _one_in(field, js)


def _one_in(field: FieldDescriptor, js: Json) -> Json:
    if field.message_type is not None:
        return for_json_format(field.message_type, js)
    if field.enum_type is not None and isinstance(js, str):
        return names_by_word(field.enum_type).get(js, js)
    return js


def _any_in(js: dict[str, Json]) -> Json:
    url = js.get("@type")
    try:
        inner = descriptor_pool.Default().FindMessageTypeByName(url.split("/")[-1] if isinstance(url, str) else "")
    except KeyError:
        return js
    if is_wrapper(inner) or inner.full_name in SPECIAL:
        return {key: for_json_format(inner, item) if key == "value" else item for key, item in js.items()}
    return {"@type": url, **for_json_format(inner, {k: v for k, v in js.items() if k != "@type"})}


def stricter(message: Descriptor, js: Json) -> Iterator[str]:
    """The listed reasons for which we refuse this value, whatever json_format says."""
    name = message.full_name
    if is_wrapper(message):
        yield from _strict_scalar(message.fields_by_name["value"], js)
    elif name in FREE:
        yield from _strict_free(js, 90)
    elif name in TEXTS:
        yield from _strict_text(name, js)
    elif name == "google.protobuf.Any":
        yield from _strict_any(js)
    elif not isinstance(js, dict):
        yield "what is no object for an object"
    else:
        yield from _strict_object(message, js)


def _strict_object(message: Descriptor, js: dict[str, Json]) -> Iterator[str]:
    by_json_name = {field.json_name for field in message.fields if field.json_name != field.name}
    if by_json_name & js.keys():
        yield "camelCase names"
    tag = tag_of(message)
    chosen: set[str] = set()
    for key, value in js.items():
        field = message.fields_by_name.get(key)
        if tag and key == "data" and isinstance(js.get("type"), str):
            field = message.fields_by_name.get(js["type"])
        if field is None:
            continue
        special_null = value is None and _null_counts(field)
        oneof = oneof_of(field)
        if oneof is not None and (value is not None or special_null):
            if oneof in chosen:
                yield "a null that is a value beside another member of its oneof"
            chosen.add(oneof)
        if value is not None:
            yield from _strict_field(field, value)


def _null_counts(field: FieldDescriptor) -> bool:
    kind = field.message_type or field.enum_type
    return kind is not None and kind.full_name in ("google.protobuf.Value", "google.protobuf.NullValue")


def _strict_field(field: FieldDescriptor, js: Json) -> Iterator[str]:
    if is_map(field):
        assert field.message_type is not None
        entry = field.message_type.fields_by_name
        if isinstance(js, dict):
            yield from _strict_keys(entry["key"], list(js))
            if entry["key"].type == F.TYPE_BOOL and not set(js) <= {"true", "false"} and None in js.values():
                # json_format is shown the map without its nulls, and so without their keys.
                yield "a null under a key that is none"
            for item in js.values():
                if item is not None:
                    yield from _strict_one(entry["value"], item)
    elif field.is_repeated:
        for item in js if isinstance(js, list) else ():
            yield from _strict_one(field, item)
    else:
        yield from _strict_one(field, js)


def _strict_keys(key: FieldDescriptor, keys: list[str]) -> Iterator[str]:
    if key.type in WIDE | NARROW:
        if any(not DIGITS.fullmatch(text) for text in keys):
            yield "integers in strings that are not plain digits"
        elif len({int(text) for text in keys}) < len(keys):
            yield "two map keys that are one number"
    elif any("\0" in text for text in keys):
        yield "NUL"


def _strict_one(field: FieldDescriptor, js: Json) -> Iterator[str]:
    if field.message_type is not None:
        yield from stricter(field.message_type, js)
    else:
        yield from _strict_scalar(field, js)


def _strict_scalar(field: FieldDescriptor, js: Json) -> Iterator[str]:
    if field.type in FLOATS:
        if isinstance(js, bool | str):
            yield "strings and booleans for floats"
        elif field.type == F.TYPE_FLOAT and isinstance(js, int) and abs(js) > FLOAT_MAX:
            yield "integers that overflow a float"
    elif field.type in NARROW and isinstance(js, str):
        yield "strings for 32-bit integers"
    elif field.type in WIDE:
        if isinstance(js, str) and not DIGITS.fullmatch(js):
            yield "integers in strings that are not plain digits"
        if isinstance(js, float) and js.is_integer() and abs(js) > SAFE:
            yield "integers beyond 2^53 written as floats"
    elif field.type == F.TYPE_BYTES and isinstance(js, str) and not BASE64.fullmatch(js):
        yield "base64 with foreign characters or wrong padding"
    elif field.enum_type is not None:
        numeric = isinstance(js, str) and js not in field.enum_type.values_by_name
        if isinstance(js, int | float) and not -(2**31) <= js < 2**31:
            yield "enum numbers beyond 32 bits"
        elif isinstance(js, bool) or (isinstance(js, float) and not js.is_integer()):
            yield "booleans and fractions for enums"
        elif numeric and js not in names_by_word(field.enum_type):
            yield "enum numbers in strings"
    elif isinstance(js, str) and "\0" in js:
        yield "NUL"


def _strict_free(js: Json, levels: int) -> Iterator[str]:
    if isinstance(js, str) and "\0" in js:
        yield "NUL"
    elif isinstance(js, int) and not isinstance(js, bool) and abs(js) > SAFE:
        yield "integers beyond 2^53 in free JSON"
    elif isinstance(js, dict):
        if levels < 3:
            yield "depth of free JSON"
            return
        if any("\0" in key for key in js):
            yield "NUL"
        for item in js.values():
            yield from _strict_free(item, levels - 3)
    elif isinstance(js, list):
        if levels < 2:
            yield "depth of free JSON"
            return
        for item in js:
            yield from _strict_free(item, levels - 2)


def _strict_text(name: str, js: Json) -> Iterator[str]:
    if not isinstance(js, str):
        return
    form = {"Timestamp": TIME, "Duration": LENGTH, "FieldMask": MASK}[name.rsplit(".", 1)[-1]]
    if not form.fullmatch(js):
        yield "times, lengths and masks written loosely"


def _strict_any(js: Json) -> Iterator[str]:
    if not isinstance(js, dict) or not isinstance(js.get("@type"), str):
        return
    try:
        inner = descriptor_pool.Default().FindMessageTypeByName(js["@type"].split("/")[-1])
    except KeyError:
        return
    rest = {key: item for key, item in js.items() if key != "@type"}
    if is_wrapper(inner) or inner.full_name in SPECIAL:
        if rest.keys() != {"value"}:
            yield "more than a value in an Any"
        else:
            yield from stricter(inner, rest["value"])
    else:
        yield from stricter(inner, rest)
