"""JSON values to messages, by functions compiled from the descriptors.

One function a message type, `f(d, m)`: it looks each field up in the object and tests the common case inline.
Whatever fails a test goes to a slow function, which converts or refuses; a refusal rises through the callers,
each of which puts its own step before the path. The good road pays for neither. Texts are taken as they are: those that
`loads` read are good, others are looked at as a whole by `check_texts`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NoReturn

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from fleet_server.protojson import scalars
from fleet_server.protojson.enums import enum_names
from fleet_server.protojson.errors import JsonError, shown, step
from fleet_server.protojson.fields import (
    FieldKind,
    Kind,
    field_kind,
    is_wrapper,
    message_kind,
    reached,
    tagged_oneof,
)
from fleet_server.protojson.json_text import text_of, texts_of
from fleet_server.protojson.source import Source, assignment, attribute, indented
from fleet_server.protojson.times import duration_in, timestamp_in
from fleet_server.protojson.wellknown import list_in, mask_in, struct_in, value_in

Decoder = Callable[[Any, Any], None]

_lock = threading.RLock()
_decoders: dict[Descriptor, Decoder] = {}
_field_decoders: dict[FieldDescriptor, Decoder] = {}
_names: dict[Descriptor, str] = {}
_waiting: list[Descriptor] = []


def decoder(message: Descriptor) -> Decoder:
    """The function that fills a message of this type from a JSON value, compiled at the first call.

    Lists and maps that the message already holds are replaced. Raises JsonError, and UnicodeEncodeError for half of a
    surrogate pair.
    """
    found = _decoders.get(message)
    if found is None:
        for inner in reached(message):
            # A bad option anywhere inside is found before anything is compiled.
            tagged_oneof(inner)
        with _lock:
            _name(message)
            _compile_waiting()
            found = _decoders[message]
    return found


def field_decoder(field: FieldDescriptor) -> Decoder:
    """The function that sets one field from its own JSON value; the paths of errors begin below the field."""
    found = _field_decoders.get(field)
    if found is None:
        with _lock:
            found = _field_function(field)
            _compile_waiting()
            _field_decoders[field] = found
    return found


def _field_function(field: FieldDescriptor) -> Decoder:
    return _source.define(_source.reserve("field"), "v, m", _guarded(field, ""))


def _member_function(field: FieldDescriptor) -> Decoder:
    """Sets a member of a tagged oneof: null is an empty message, and an error elsewhere."""
    set_field = _field_function(field)
    kind = field_kind(field)

    def read(value: Any, message: Any) -> None:
        if value is None and kind.message is None and kind.kind is not Kind.NULL:
            raise JsonError(f"is required by this type ({field.name})")
        if value is None and kind.message is not None and kind.kind is not Kind.VALUE:
            getattr(message, field.name).SetInParent()
        else:
            set_field(value, message)

    return read


def any_in(value: Any, message: Any) -> None:
    """Reads an Any of a type that the default pool knows."""
    if type(value) is not dict:
        scalars.wrong("an object", value, "")
    if not value:
        return
    url = value.get("@type")
    if type(url) is not str:
        raise JsonError("must name the type, as in type.googleapis.com/package.Message", path="@type")
    try:
        inner = descriptor_pool.Default().FindMessageTypeByName(url.rpartition("/")[2])
    except KeyError:
        raise JsonError(f"must name a known type; got {shown(url)}", path="@type") from None
    content = message_factory.GetMessageClass(inner)()
    rest = {key: item for key, item in value.items() if key != "@type"}
    if is_wrapper(inner) or message_kind(inner) is not Kind.MESSAGE:
        if rest.keys() != {"value"}:
            raise JsonError(f"must hold @type and value alone, for {inner.full_name}")
        try:
            decoder(inner)(rest["value"], content)
        except JsonError as error:
            error.within("value")
            raise
    else:
        decoder(inner)(rest, content)
    message.type_url = url
    message.value = content.SerializeToString()


_WELL_KNOWN: dict[Kind, Decoder] = {
    Kind.TIMESTAMP: timestamp_in,
    Kind.DURATION: duration_in,
    Kind.FIELD_MASK: mask_in,
    Kind.ANY: any_in,
    Kind.STRUCT: struct_in,
    Kind.VALUE: value_in,
    Kind.LIST_VALUE: list_in,
}

_ALWAYS_SET = {Kind.TIMESTAMP, Kind.DURATION, Kind.VALUE, Kind.STRUCT, Kind.LIST_VALUE}
"""Messages whose reader sets them in any case, so that they need not be marked as set before."""


def _two_members(first: str, second: str) -> NoReturn:
    raise JsonError(f"must not be given together with {first}; give one of them", path=second)


def _key_twice(key: str) -> NoReturn:
    raise JsonError("is given twice; give each key once", path=step(key))


def _bad_tag(value: object, words: tuple[str, ...]) -> NoReturn:
    scalars.wrong("one of " + ", ".join(words), value, "type")


def _key_in(kind: Kind) -> Callable[[str], Any]:
    """A reader of map keys other than texts, which JSON writes as strings all the same."""
    if kind is Kind.BOOL:
        return lambda key: scalars.bool_in({"true": True, "false": False}.get(key, key), step(key))
    return lambda key: scalars.integer_text_in(kind, key, step(key))


_source = Source(
    JsonError=JsonError,
    step=step,
    text_of=text_of,
    wrong=scalars.wrong,
    unknown=scalars.unknown,
    two_members=_two_members,
    key_twice=_key_twice,
    bad_tag=_bad_tag,
    text_in=scalars.text_in,
    bool_in=scalars.bool_in,
    bytes_in=scalars.bytes_in,
    DOUBLE_MAX=scalars.DOUBLE_MAX,
    FLOAT_MAX=scalars.FLOAT_MAX,
    **{f"{kind.value}_in": scalars.integer_in(kind) for kind in scalars.RANGES},
    **{f"{kind.value}_in": scalars.float_in(kind) for kind in (Kind.FLOAT, Kind.DOUBLE)},
    **{f"{kind.value}_key": _key_in(kind) for kind in (Kind.BOOL, *scalars.RANGES)},
    **{f"{kind.value}_in": function for kind, function in _WELL_KNOWN.items()},
)


def _name(message: Descriptor) -> str:
    name = _names.get(message)
    if name is None:
        kind = message_kind(message)
        if kind is Kind.MESSAGE:
            name = _source.reserve("decode")
            _waiting.append(message)
        else:
            name = f"{kind.value}_in"
            _decoders[message] = _WELL_KNOWN[kind]
        _names[message] = name
    return name


def _compile_waiting() -> None:
    # Published together: no other thread may meet a function whose inner ones are still to come.
    done: dict[Descriptor, Decoder] = {}
    while _waiting:
        message = _waiting.pop()
        if is_wrapper(message):
            value = message.fields_by_name["value"]
            lines = ["v = d", *_check(field_kind(value), "v", "''"), assignment("value", "v")]
        else:
            lines = _object(message)
        done[message] = _source.define(_names[message], "d, m", lines)
    _decoders.update(done)


def _object(message: Descriptor) -> list[str]:
    """The body of a message's function."""
    tagged = tagged_oneof(message)
    plain = [field for field in message.fields if tagged is None or field_kind(field).oneof is not tagged]
    known = tuple(field.name for field in plain) + (("type", "data") if tagged else ())
    names = _source.add("names", frozenset(known))
    listed = _source.add("known", known)
    lines = [
        "if type(d) is not dict: wrong('an object', d, '')",
        *(f"d = text_of(d, {path!r}, {name!r})" for name, path in texts_of(message)),
        f"if not d.keys() <= {names}: raise unknown(next(key for key in d if key not in {names}), {listed})",
        "get = d.get",
    ]
    oneofs = {oneof.name: f"o{index}" for index, oneof in enumerate(message.oneofs)}
    lines += [f"{mark} = None" for mark in oneofs.values()]
    for field in plain:
        lines += _field(field, oneofs)
    if tagged is not None:
        members = _source.add("members", {field.name: _member_function(field) for field in tagged.fields})
        words = _source.add("words", tuple(field.name for field in tagged.fields))
        lines += [
            "v = get('type')",
            "if v is not None:",
            f"    read = {members}.get(v) if type(v) is str else None",
            f"    if read is None: bad_tag(v, {words})",
            "    try: read(get('data'), m)",
            "    except JsonError as e: e.within('data'); raise",
            "elif get('data') is not None:",
            f"    bad_tag(None, {words})",
        ]
    return lines


def _field(field: FieldDescriptor, oneofs: dict[str, str]) -> list[str]:
    """Looks a field up in d and reads it; null is as good as absent, but where null is a value."""
    kind = field_kind(field)
    nulls = not kind.repeated and kind.map_key is None and kind.kind in (Kind.VALUE, Kind.NULL)
    lines: list[str] = []
    if kind.oneof is not None:
        mark = oneofs[kind.oneof.name]
        lines += [f"if {mark} is not None: two_members({mark}, {field.name!r})", f"{mark} = {field.name!r}"]
    lines += _guarded(field, field.name)
    if nulls:
        return [f"if {field.name!r} in d:", *indented([f"v = d[{field.name!r}]", *lines])]
    return [f"v = get({field.name!r})", "if v is not None:", *indented(lines)]


def _guarded(field: FieldDescriptor, label: str) -> list[str]:
    """Reads v into a field; `label` is the field's step of the path."""
    kind = field_kind(field)
    if kind.map_key is not None:
        return _map(field, kind, kind.map_key, label)
    if kind.repeated:
        return _list(field, kind, label)
    if kind.message is None:
        return [*_check(kind, "v", repr(label)), assignment(field.name, "v")]
    return [
        f"s = {attribute(field.name)}",
        *([] if kind.kind in _ALWAYS_SET and not kind.wrapped else ["s.SetInParent()"]),
        f"try: {_name(kind.message)}(v, s)",
        f"except JsonError as e: e.within({label!r}); raise",
    ]


def _fresh(field: FieldDescriptor) -> list[str]:
    """The empty container of a list or map."""
    read = attribute(field.name)
    return [f"c = {read}", "if c:", f"    m.ClearField({field.name!r})", f"    c = {read}"]


def _list(field: FieldDescriptor, kind: FieldKind, label: str) -> list[str]:
    lines = [f"if type(v) is not list: wrong('a list', v, {label!r})", *_fresh(field)]
    if kind.message is None:
        check = _check(kind, "x", f"f'{label}[{{len(r)}}]'")
        return [*lines, "r = []", "for x in v:", *indented(check), "    r.append(x)", "c.extend(r)"]
    return [
        *lines,
        "add = c.add",
        "try:",
        f"    for x in v: {_name(kind.message)}(x, add())",
        f"except JsonError as e: e.within(f'{label}[{{len(c) - 1}}]'); raise",
    ]


def _map(field: FieldDescriptor, kind: FieldKind, key: Kind, label: str) -> list[str]:
    lines = [f"if type(v) is not dict: wrong('an object', v, {label!r})", *_fresh(field)]
    if kind.message is None:
        entry = [*_check(kind, "x", "step(k)"), "c[j] = x"]
    else:
        entry = [f"try: {_name(kind.message)}(x, c[j])", "except JsonError as e: e.within(step(k)); raise"]
    if kind.kind is not Kind.VALUE:
        entry = ["if x is None: continue", *entry]
    read = ["j = k"] if key is Kind.STRING else [f"j = {key.value}_key(k)", "if j in c: key_twice(k)"]
    body = ["try:", "    for k, x in v.items():", *indented(indented([*read, *entry]))]
    return [*lines, *body, f"except JsonError as e: e.within({label!r}); raise"]


def _check(kind: FieldKind, name: str, path: str) -> list[str]:
    """Lines that make the JSON value in `name` fit for the field; `path` is an expression, evaluated only if
    needed.
    """
    slow = f"{name} = {kind.kind.value}_in({name}, {path})"
    match kind.kind:
        case Kind.STRING:
            slow = f"{name} = text_in({name}, {path})"
            return [f"if type({name}) is not str: {slow}"]
        case Kind.BOOL:
            return [f"if {name} is not True and {name} is not False: {slow}"]
        case Kind.DOUBLE | Kind.FLOAT:
            limit = f"{kind.kind.name}_MAX"
            return [f"if type({name}) is not float or not -{limit} <= {name} <= {limit}: {slow}"]
        case Kind.BYTES:
            return [slow]
        case Kind.ENUM | Kind.NULL if kind.enum is not None:
            return _check_enum(kind.enum, name, path, null=kind.kind is Kind.NULL)
        case _:
            low, high = scalars.RANGES[kind.kind]
            return [f"if type({name}) is not int or not {low} <= {name} <= {high}: {slow}"]


def _check_enum(enum: EnumDescriptor, name: str, path: str, *, null: bool) -> list[str]:
    names = enum_names(enum)
    numbers = _source.add("numbers", dict(names.numbers))
    other = _source.add("enum_in", scalars.enum_in(names, closed=enum.is_closed))
    lines = [
        f"e = {numbers}.get({name}) if type({name}) is str else None",
        f"{name} = e if e is not None else {other}({name}, {path})",
    ]
    return [f"if {name} is None: {name} = 0", "else:", *indented(lines)] if null else lines
