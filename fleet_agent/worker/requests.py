"""Requests for a picture: the documented JSON, judged by the rules of the contract."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import protovalidate
from fleet.transcode.v1 import options_pb2
from fleet.v1 import fleet_pb2, types_pb2
from google.protobuf import json_format

SEED_SPAN = (1 << 53) - 64
_validator = protovalidate.Validator()


class RequestError(Exception):
    """A request that is answered with an error: its status, its reason and words."""

    def __init__(self, status: int, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.reason = reason
        self.detail = detail


def read_picture(body: bytes, draw: Callable[[int], int] = random.randrange) -> types_pb2.ImagePayload:
    """The payload of a body, defaults filled in and seed drawn. Raises RequestError, naming the field."""
    request = fleet_pb2.FleetGenerateRequest()
    try:
        value = json.loads(body or b"{}", object_pairs_hook=_once)
        if not isinstance(value, dict):
            raise ValueError("a JSON object is wanted")
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "MALFORMED_JSON", f"the body is no JSON object: {error}") from error
    try:
        json_format.ParseDict({name: one for name, one in value.items() if one is not None}, request)
    except json_format.ParseError as error:
        raise _unparsable(request, value, error) from error
    _fill(request)
    found = _validator.collect_violations(request)
    if found:
        first = found[0].proto
        field = protovalidate_path(first)
        raise RequestError(400, "INVALID_FIELD", f"{field}: {first.message}")
    for name in ("init_image", "mask_image"):
        if request.HasField(name):
            raise RequestError(400, "INVALID_FIELD", f"{name}: a worker has no files; ask the fleet")
    if not request.HasField("seed"):
        request.seed = draw(SEED_SPAN)
    payload = types_pb2.ImagePayload.FromString(request.SerializeToString())
    payload.DiscardUnknownFields()
    payload.ClearField("strength")
    return payload


def protovalidate_path(violation: Any) -> str:
    """The field of a violation, as a caller writes it."""
    elements = [] if violation.field is None else list(violation.field.elements)
    return ".".join(element.field_name for element in elements)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _unparsable(request: Any, value: dict[str, Any], error: Exception) -> RequestError:
    unknown = [name for name in value if name not in request.DESCRIPTOR.fields_by_name]
    if unknown:
        return RequestError(400, "UNKNOWN_FIELD", f"{unknown[0]}: is not known")
    return RequestError(400, "INVALID_FIELD", str(error))


def _fill(request: Any) -> None:
    """Sets unset fields to their defaults, as the contract's options give them."""
    for field in request.DESCRIPTOR.fields:
        rules = field.GetOptions().Extensions[options_pb2.field]
        form = rules.WhichOneof("default")
        if form is not None and not request.HasField(field.name):
            setattr(request, field.name, getattr(rules, form))
