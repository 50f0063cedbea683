"""Timestamp and Duration as text: RFC 3339 in UTC, and seconds with an "s". 0, 3, 6 or 9 digits of fraction
go out, up to 9 come in; the ranges are those of the well-known types (years 1 to 9999, about 10,000
years).
"""

from __future__ import annotations

import datetime
import re
from typing import Any

from fleet_server.protojson.errors import JsonError, shown

_DAY = 86_400
_FIRST_SECOND = -62_135_596_800
_LAST_SECOND = 253_402_300_799
_FIRST_MINUTE = _FIRST_SECOND // 60
_LAST_MINUTE = _LAST_SECOND // 60
_LONGEST_SECONDS = 315_576_000_000
_EPOCH = datetime.date(1970, 1, 1).toordinal()
_NANOS = tuple(10 ** (9 - digits) for digits in range(10))
"""Nanoseconds of the last digit, by the number of digits."""

_TIMESTAMP = re.compile(
    r"(\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2})(?:\.(\d{1,9}))?(?:Z|([+-])([01]\d|2[0-3]):([0-5]\d))", re.ASCII
)
_DURATION = re.compile(r"(-?)(\d{1,12})(?:\.(\d{1,9}))?s", re.ASCII)

_MINUTES = tuple(f"T{minute // 60:02d}:{minute % 60:02d}:" for minute in range(1440))
_SECONDS = tuple(f"{second:02d}" for second in range(60))
_THOUSANDS = tuple(f"{number:03d}" for number in range(1000))
_UNITS = {len("2026-11-22T21:14:15.Z") + digits: _NANOS[digits] for digits in range(1, 10)}
"""Nanoseconds of the last digit, by the length of a time in UTC with a fraction."""
_WRITTEN_SECONDS = {text: second for second, text in enumerate(_SECONDS)}
# Dates and minutes repeat: messages speak of few. Emptied when full, so that odd data cannot make them grow.
_dates: dict[int, str] = {}
_minutes: dict[int, str] = {}
_written_minutes: dict[str, int] = {}
_KEPT = 1024


def _minute(number: int) -> str:
    """A minute since 1970, as far as its last colon. Raises ValueError where it is out of range."""
    if not _FIRST_MINUTE <= number <= _LAST_MINUTE:
        raise ValueError(f"Timestamp out of range: minute {number} since 1970")
    day, minute = divmod(number, 1440)
    date = _dates.get(day)
    if date is None:
        if len(_dates) >= _KEPT:
            _dates.clear()
        date = _dates[day] = datetime.date.fromordinal(_EPOCH + day).isoformat()
    if len(_minutes) >= _KEPT:
        _minutes.clear()
    text = _minutes[number] = date + _MINUTES[minute]
    return text


def _keep_minute(text: str, first_second: int) -> None:
    if len(_written_minutes) >= _KEPT:
        _written_minutes.clear()
    _written_minutes[text] = first_second


def _fraction(nanos: int) -> str:
    # Not divmod, which makes a tuple: of numbers this small the two by themselves cost half.
    millis = _THOUSANDS[nanos // 1_000_000]
    rest = nanos % 1_000_000
    if not rest:
        return f".{millis}"
    micros = _THOUSANDS[rest // 1000]
    nanos = rest % 1000
    return f".{millis}{micros}{_THOUSANDS[nanos]}" if nanos else f".{millis}{micros}"


def timestamp_out(message: Any) -> str:
    """`2026-11-22T10:00:00.120Z`. Raises ValueError for a time out of range."""
    seconds = message.seconds
    nanos = message.nanos
    minute = seconds // 60
    text = _minutes.get(minute) or _minute(minute)
    second = _SECONDS[seconds - minute * 60]
    if not nanos:
        return f"{text}{second}Z"
    if not 0 < nanos < 1_000_000_000:
        raise ValueError(f"Timestamp out of range: {seconds} seconds, {nanos} nanos")
    # As `_fraction`, without a call and a text of its own.
    millis = _THOUSANDS[nanos // 1_000_000]
    rest = nanos % 1_000_000
    if not rest:
        return f"{text}{second}.{millis}Z"
    if rest % 1000:
        return f"{text}{second}{_fraction(nanos)}Z"
    return f"{text}{second}.{millis}{_THOUSANDS[rest // 1000]}Z"


def timestamp_in(value: object, message: Any) -> None:
    """Reads a RFC 3339 time with any offset."""
    if type(value) is str and (unit := _UNITS.get(len(value))) is not None:
        # As nearly all are written: in UTC, with a fraction, in a minute that was seen before.
        start = _written_minutes.get(value[:17])
        second = _WRITTEN_SECONDS.get(value[17:19])
        digits = value[20:-1]
        if (
            start is not None
            and second is not None
            and value[19] == "."
            and value[-1] == "Z"
            and digits.isdecimal()
            and digits.isascii()
        ):
            message.seconds = start + second
            message.nanos = int(digits) * unit
            return
    _any_timestamp_in(value, message)


def _any_timestamp_in(value: object, message: Any) -> None:
    match = _TIMESTAMP.fullmatch(value) if type(value) is str else None
    if match is None:
        raise JsonError(f'must be a RFC 3339 time such as "2026-11-22T10:00:00.120Z"; got {shown(value)}')
    written, fraction, sign, hours, minutes = match.groups()
    try:
        moment = datetime.datetime.fromisoformat(written)
    except ValueError as error:
        raise JsonError(f"must be a time that exists: {error}; got {shown(value)}") from None
    start = (moment.toordinal() - _EPOCH) * _DAY + moment.hour * 3600 + moment.minute * 60
    _keep_minute(written[:17], start)
    seconds = start + moment.second
    if sign:
        offset = int(hours) * 3600 + int(minutes) * 60
        seconds += -offset if sign == "+" else offset
        if not _FIRST_SECOND <= seconds <= _LAST_SECOND:
            raise JsonError(f"must be a time in the years 1 to 9999, in UTC; got {shown(value)}")
    message.seconds = seconds
    message.nanos = int(fraction) * _NANOS[len(fraction)] if fraction else 0


def duration_out(message: Any) -> str:
    """`1.500s`. Raises ValueError for a length out of range or of mixed signs."""
    seconds = message.seconds
    nanos = message.nanos
    mixed = (seconds < 0 < nanos) or (nanos < 0 < seconds)
    if mixed or abs(seconds) > _LONGEST_SECONDS or abs(nanos) >= 1_000_000_000:
        raise ValueError(f"Duration out of range: {seconds} seconds, {nanos} nanos")
    sign = "-" if seconds < 0 or nanos < 0 else ""
    return f"{sign}{abs(seconds)}{_fraction(abs(nanos)) if nanos else ''}s"


def duration_in(value: object, message: Any) -> None:
    """Reads seconds with an "s"."""
    match = _DURATION.fullmatch(value) if type(value) is str else None
    if match is None:
        raise JsonError(f'must be seconds such as "1.5s", up to 9 digits of fraction; got {shown(value)}')
    sign, whole, fraction = match.groups()
    seconds = int(whole)
    if seconds > _LONGEST_SECONDS:
        raise JsonError(f"must be at most {_LONGEST_SECONDS}s; got {shown(value)}")
    nanos = int(fraction) * _NANOS[len(fraction)] if fraction else 0
    message.seconds = -seconds if sign else seconds
    message.nanos = -nanos if sign else nanos
