"""The well-known messages with a JSON form of their own: free JSON (Struct, Value, ListValue) and FieldMask.

Readers take the JSON value, its texts good, and the message to fill, writers take the message. Times are in times.py;
Any, whose content is any message, is made by the encoder and decoder themselves.
"""

from __future__ import annotations

import re
from typing import Any

from fleet_server.protojson.errors import JsonError, shown, step
from fleet_server.protojson.scalars import DOUBLE_MAX, SAFE

# protobuf parsers refuse more than 100 messages inside each other, and free JSON takes three of them for an
# object and two for a list. What could be written but never read back is refused at the door; the rest is
# left to the messages around.
_LEVELS = 90
_OBJECT_LEVELS = 3
_LIST_LEVELS = 2

# Comparing a float with an integer costs several times what comparing two floats does.
_SAFE_FLOAT = float(SAFE)
_LEAST_FLOAT = -_SAFE_FLOAT

_MASK = re.compile(r"(?:[a-z_][a-z0-9_]*(?:[.,][a-z_][a-z0-9_]*)*)?")


def value_out(value: Any) -> Any:
    """Free JSON; integral numbers within 2^53 as integers, an unset Value as null. Raises ValueError for NaN
    and Infinity.
    """
    # What is not empty is the member that is set: one look, where asking for the member's name takes two.
    return value.string_value or _no_text_out(value)


def _no_text_out(value: Any) -> Any:
    """A Value that is no text, or an empty one."""
    number = value.number_value
    if number:
        if _LEAST_FLOAT <= number <= _SAFE_FLOAT:
            return int(number) if number.is_integer() else number
        if not -DOUBLE_MAX <= number <= DOUBLE_MAX:
            raise ValueError(f"Value.number_value is {number}, which JSON cannot hold")
        return number
    return _no_number_out(value)


def _no_number_out(value: Any) -> Any:
    """A Value that is neither text nor number, or an empty one of these."""
    kind = value.WhichOneof("kind")
    if kind == "bool_value":
        return value.bool_value
    if kind == "struct_value":
        return struct_out(value.struct_value)
    if kind == "list_value":
        return list_out(value.list_value)
    if kind == "string_value":
        return ""
    return 0 if kind == "number_value" else None


def struct_out(message: Any) -> dict[str, Any]:
    """A Struct as an object."""
    fields = message.fields
    found: dict[str, Any] = {}
    for key in fields:
        value = fields[key]
        # As `value_out`, without a call for texts and plain numbers.
        text = value.string_value
        if text:
            found[key] = text
            continue
        number = value.number_value
        if not number:
            found[key] = _no_number_out(value)
        elif _LEAST_FLOAT <= number <= _SAFE_FLOAT:
            found[key] = int(number) if number.is_integer() else number
        else:
            found[key] = _no_text_out(value)
    return found


def list_out(message: Any) -> list[Any]:
    """A ListValue as a list."""
    # A slice is a plain list, which is faster to walk than the container.
    return [value.string_value or _no_text_out(value) for value in message.values[:]]


def value_in(value: object, message: Any, levels: int = _LEVELS) -> None:
    """Reads free JSON, null included. Integers beyond 2^53 are refused, since a Value holds doubles."""
    kind = type(value)
    if kind is str:
        message.string_value = value
    elif kind is bool:
        message.bool_value = value
    elif kind is float:
        if not -DOUBLE_MAX <= value <= DOUBLE_MAX:  # type: ignore[operator]
            raise JsonError(f"must be a finite number; got {shown(value)}")
        message.number_value = value
    elif kind is int:
        if not -SAFE <= value <= SAFE:  # type: ignore[operator]
            raise JsonError(f"must be within 2^53 (9007199254740992), or a string; got {shown(value)}")
        message.number_value = float(value)  # type: ignore[arg-type]  # protobuf takes three times as long
    elif value is None:
        message.null_value = 0
    elif kind is dict:
        struct_in(value, message.struct_value, levels - 1)
    elif kind is list:
        list_in(value, message.list_value, levels)
    else:
        raise JsonError(f"must be a JSON value; got {shown(value)}")


def struct_in(value: object, message: Any, levels: int = _LEVELS) -> None:
    """Reads an object of free JSON into a Struct, whose content it replaces and which is set then."""
    if type(value) is not dict:
        raise JsonError(f"must be an object; got {shown(value)}")
    fields = message.fields
    if fields:
        fields.clear()
    if not value:
        # Else its first member sets it.
        message.SetInParent()
    levels -= _OBJECT_LEVELS - 1
    if levels < 0:
        raise _too_deep()
    key = ""
    try:
        for key, item in value.items():
            kind = type(item)
            # As `value_in`, without a call for plain texts and integers.
            if kind is str:
                fields[key].string_value = item
            elif kind is int and -SAFE <= item <= SAFE:
                fields[key].number_value = float(item)
            else:
                value_in(item, fields[key], levels)
    except JsonError as error:
        error.within(step(key))
        raise


def list_in(value: object, message: Any, levels: int = _LEVELS) -> None:
    """Reads a list of free JSON into a ListValue, whose content it replaces and which is set then."""
    if type(value) is not list:
        raise JsonError(f"must be a list; got {shown(value)}")
    values = message.values
    if values:
        del values[:]
    if not value:
        message.SetInParent()
    levels -= _LIST_LEVELS
    if levels < 0:
        raise _too_deep()
    try:
        for item in value:
            value_in(item, values.add(), levels)
    except JsonError as error:
        error.within(f"[{len(values) - 1}]")
        raise


def _too_deep() -> JsonError:
    return JsonError("is nested too deep: at most 30 objects or 45 lists inside each other")


def mask_out(message: Any) -> str:
    """Field names, comma-separated, as they stand in the proto."""
    return ",".join(message.paths)


def mask_in(value: object, message: Any) -> None:
    """Reads comma-separated field names."""
    if type(value) is not str or not _MASK.fullmatch(value):
        raise JsonError(f'must be field names such as "priority,payload.steps"; got {shown(value)}')
    if message.paths:
        del message.paths[:]
    if value:
        message.paths.extend(value.split(","))
