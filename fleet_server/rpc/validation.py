"""Judges a message by the rules in its proto (protovalidate) and says what is wrong in words that name the field."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import protovalidate
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from fleet_server.domain.errors import FleetError, Violation
from fleet_server.rpc.precheck import surely_valid
from fleet_server.rpc.words import requirement

_SHOWN_CHARACTERS = 40
_validator = protovalidate.Validator()


def validate(message: Message, *, path: str = "") -> None:
    """Raises INVALID_FIELD with one violation for each bad field; `path` is put before the fields' own paths.

    The rules are read once for each type; a good message costs some microseconds at most.
    """
    if surely_valid(message):
        return
    found = _validator.collect_violations(message)
    if found:
        raise _error(message, found, path)


def _error(message: Message, found: Iterable[protovalidate.Violation], prefix: str) -> FleetError:
    violations: list[Violation] = []
    details: list[str] = []
    for item in found:
        elements = list(item.proto.field.elements) if item.proto.field is not None else []
        field_path, field = _path(message.DESCRIPTOR, elements)
        words = (requirement(field) if field is not None else "") or item.proto.message
        if item.proto.rule_id == "required" and not words.startswith("is required"):
            words = f"is required, and {words}"
        whole = ".".join(part for part in (prefix, field_path) if part)
        if any(known.field == whole for known in violations):
            continue
        violations.append(Violation(whole, words))
        details.append(f"{whole}: {words}{_seen(field, item.field_value)}" if whole else words)
    return FleetError("INVALID_FIELD", "; ".join(details), violations=violations)


def _path(descriptor: Any, elements: Iterable[Any]) -> tuple[str, FieldDescriptor | None]:
    """The path as a caller writes it, and the field at its end."""
    parts: list[str] = []
    field: FieldDescriptor | None = None
    for element in elements:
        field = descriptor.fields_by_name.get(element.field_name) if descriptor is not None else None
        part = str(element.field_name)
        subscript = element.subscript
        if subscript is not None:
            part += f"[{subscript.value}]" if subscript.field == "index" else f'["{subscript.value}"]'
        parts.append(part)
        descriptor = field.message_type if field is not None else None
    return ".".join(parts), field


def _seen(field: FieldDescriptor | None, value: object) -> str:
    """What came, where it is short and no secret."""
    if field is not None and field.enum_type is not None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return ""
    if isinstance(value, str):
        if len(value) > _SHOWN_CHARACTERS:
            return f"; got {len(value):,} characters"
        return f"; got {value!r}" if value else ""
    return f"; got {value:g}" if isinstance(value, float) else f"; got {value}"
