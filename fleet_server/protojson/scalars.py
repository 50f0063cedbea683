"""One scalar value, in and out: the slow side of each check.

The compiled converters test for the common case inline; only what fails that test comes here, to be converted
after all (an integral float for an integer, an integer for a float) or refused with a sentence that names the
field.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import re
import struct
from collections.abc import Callable
from typing import NoReturn

from fleet_server.protojson.enums import EnumNames
from fleet_server.protojson.errors import UNKNOWN_FIELD, JsonError, shown, step
from fleet_server.protojson.fields import Kind

SAFE = 1 << 53
"""Integers up to here, either sign, are exact in every JSON reader."""
DOUBLE_MAX = 1.7976931348623157e308
FLOAT_MAX = 3.4028234663852886e38
RANGES = {
    Kind.INT32: (-(1 << 31), (1 << 31) - 1),
    Kind.UINT32: (0, (1 << 32) - 1),
    Kind.INT64: (-(1 << 63), (1 << 63) - 1),
    Kind.UINT64: (0, (1 << 64) - 1),
}

DECIMAL = re.compile(r"-?\d{1,20}", re.ASCII)
"""How strings write integers."""
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]*(={0,2})", re.ASCII)
_TO_STANDARD = str.maketrans("-_", "+/")
_FLOAT = struct.Struct("<f")
_EXACT_FLOAT = 1 << 24


def wrong(wanted: str, value: object, path: str) -> NoReturn:
    """Refuses `value`."""
    raise JsonError(f"must be {wanted}; got {shown(value)}", path=path)


def text_in(value: object, path: str) -> str:
    """A string that UTF-8 can hold, without NUL."""
    if type(value) is not str:
        wrong("a string", value, path)
    if "\0" in value:
        raise JsonError("must not hold the NUL character", path=path)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise JsonError("must not hold half of a surrogate pair", path=path) from None
    return value


def bool_in(value: object, path: str) -> bool:
    """Only true and false."""
    if type(value) is bool:
        return value
    wrong("true or false", value, path)


def integer_in(kind: Kind) -> Callable[[object, str], int]:
    """A reader of integers: numbers, integral ones such as 1e3 too, and for 64 bits decimal digits in a
    string.
    """
    low, high = RANGES[kind]
    wide = kind in (Kind.INT64, Kind.UINT64)
    wanted = f"a whole number from {low} to {high}"
    beyond = f"{wanted}; beyond 2^53 written with all digits" if wide else wanted

    def read(value: object, path: str) -> int:
        number: int
        if type(value) is int:
            number = value
        elif type(value) is float and value.is_integer():
            # A float beyond 2^53 may already be another number than the one written.
            if wide and not -SAFE <= value <= SAFE:
                wrong(beyond, value, path)
            number = int(value)
        elif wide and type(value) is str and DECIMAL.fullmatch(value):
            number = int(value)
        else:
            wrong(wanted if wide or type(value) is not str else f"{wanted}, without quotes", value, path)
        if not low <= number <= high:
            wrong(wanted, value, path)
        return number

    return read


def integer_text_in(kind: Kind, text: str, path: str) -> int:
    """Decimal digits in range: how map keys and query parameters write integers."""
    low, high = RANGES[kind]
    if not DECIMAL.fullmatch(text) or not low <= int(text) <= high:
        wrong(f"a whole number from {low} to {high}", text, path)
    return int(text)


def float_in(kind: Kind) -> Callable[[object, str], float]:
    """A reader of floats: JSON numbers only, in range."""
    limit = FLOAT_MAX if kind is Kind.FLOAT else DOUBLE_MAX
    wanted = "a number" if kind is Kind.DOUBLE else "a number within 32-bit floating point"

    def read(value: object, path: str) -> float:
        number = value
        if type(number) is int:
            try:
                number = float(number)
            except OverflowError:
                wrong(wanted, value, path)
        if type(number) is not float or not -limit <= number <= limit:
            wrong(f"{wanted}, without quotes" if type(value) is str else wanted, value, path)
        return number

    return read


def bytes_in(value: object, path: str) -> bytes:
    """Base64, standard or url-safe, with or without padding."""
    match = _BASE64.fullmatch(value) if type(value) is str else None
    if match is not None and type(value) is str:
        padding = len(match[1])
        length = len(value) - padding
        if not padding or len(value) % 4 == 0:
            try:
                return base64.b64decode(value[:length].translate(_TO_STANDARD) + "=" * (-length % 4))
            except binascii.Error:
                pass
    wrong("base64 in a string", value, path)


def enum_in(names: EnumNames, *, closed: bool) -> Callable[[object, str], int]:
    """A reader of what is no known word: numbers of an open enum; else an error that lists the words."""
    low, high = RANGES[Kind.INT32]
    wanted = "one of " + ", ".join(names.listed)

    def read(value: object, path: str) -> int:
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is int and low <= value <= high and (not closed or value in names.words):
            return value
        wrong(wanted, value, path)

    return read


def bytes_out(value: bytes) -> str:
    """Standard base64 with padding."""
    return binascii.b2a_base64(value, newline=False).decode("ascii")


def double_out(value: float) -> float | str:
    """A double that is not finite, by its name."""
    if value != value:
        return "NaN"
    if value > DOUBLE_MAX:
        return "Infinity"
    return "-Infinity" if value < -DOUBLE_MAX else value


def float_out(value: float) -> float | str:
    """The shortest decimal that reads back as the same 32-bit float."""
    if -_EXACT_FLOAT <= value <= _EXACT_FLOAT and value.is_integer():
        return value
    if not -DOUBLE_MAX <= value <= DOUBLE_MAX:
        return double_out(value)
    for digits in (6, 7, 8, 9):
        short = float(f"{value:.{digits}g}")
        if abs(short) <= FLOAT_MAX and _FLOAT.unpack(_FLOAT.pack(short))[0] == value:
            return short
    # The largest floats: their short forms lie beyond the range that is read.
    return value


def unknown(name: str, known: tuple[str, ...], what: str = "field") -> JsonError:
    """The error for a name that is not among `known`, with the nearest ones."""
    near = difflib.get_close_matches(name, known, n=3)
    if near:
        hint = f"; did you mean {' or '.join(near)}?"
    elif known:
        hint = f"; known: {', '.join(known[:40])}"
    else:
        hint = "; nothing is taken here"
    return JsonError(f"unknown {what}{hint}", path=step(name), reason=UNKNOWN_FIELD)
