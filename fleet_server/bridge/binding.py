"""From the parts of an HTTP request to the request message of a method, by its binding."""

from __future__ import annotations

import re
from typing import Any, Final
from urllib.parse import parse_qsl

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from fleet_server.bridge.httprule import Binding, takes_raw_body
from fleet_server.bridge.routes import Variables
from fleet_server.domain.errors import FleetError, Violation
from fleet_server.protojson import JsonCodec, JsonError, loads

_MAX_PARAMETERS: Final = 1000
_BAD_ESCAPE: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_JSON_TYPE: Final = re.compile(rb'\s*application/json\s*(;\s*charset\s*=\s*"?utf-8"?\s*)?;?\s*', re.IGNORECASE)


def from_json_error(error: JsonError) -> FleetError:
    """The same fault in the server's currency."""
    detail = f"{error.path}: {error.description}" if error.path else error.description
    violations = [Violation(error.path, error.description)] if error.path else []
    return FleetError(error.reason, detail, violations=violations)


class RequestBinder:
    """Builds the requests of one binding. All methods raise FleetError with a 4xx reason, naming the field at fault."""

    def __init__(self, binding: Binding, codec: JsonCodec) -> None:
        self._codec = codec
        self._class: type[Message] = GetMessageClass(binding.method.input_type)
        self._descriptor = binding.method.input_type
        self._body = binding.body
        self._body_field = binding.body_field
        self._raw = takes_raw_body(binding)
        self._paths = frozenset(variable.name for variable in binding.template.variables)
        self._plain = frozenset(
            name for name in self._paths if _is_plain_text(self._descriptor.fields_by_name.get(name))
        )

    def bind(self, variables: Variables, query: bytes, body: bytes, content_type: bytes | None) -> Message:
        """The request of an HTTP call. An empty body counts as `{}` and needs no content type."""
        try:
            if self._body == "*":
                return self._bind_whole(variables, query, body, content_type)
            request = self.bind_texts(variables, query)
            if self._body_field is not None:
                self._bind_field(request, self._body_field, body, content_type)
            elif body:
                _refuse_body(body, content_type)
            return request
        except JsonError as error:
            raise from_json_error(error) from None

    def bind_texts(self, variables: Variables, query: bytes) -> Message:
        """A request of path and query alone (and a WebSocket's)."""
        request = self._class()
        try:
            self._set_variables(request, variables)
            if query:
                self._set_query(request, query)
        except JsonError as error:
            raise from_json_error(error) from None
        return request

    def bind_frame(self, variables: Variables, query: bytes, text: str | bytes) -> Message:
        """A request message of one JSON frame, with the fields of path and query set over it."""
        try:
            value = loads(text.encode() if isinstance(text, str) else text)
            request = self._codec.decode(self._descriptor, value, loaded=True)
            if variables or query:
                self._refuse_conflicts(value, variables, "the path")
                self._set_variables(request, variables)
            if query:
                pairs = _parse_query(query)
                self._refuse_conflicts(value, [(name, "") for name in pairs], "the query")
                self._set_query(request, query)
        except (JsonError, UnicodeEncodeError) as error:
            if isinstance(error, JsonError):
                raise from_json_error(error) from None
            raise FleetError("MALFORMED_JSON", "the frame holds lone surrogates; send UTF-8") from None
        return request

    def raw_body(self, request: Message, data: bytes, content_type: bytes | None) -> None:
        """Put body bytes into the request's HttpBody, as they are."""
        target: Any = request if self._body_field is None else getattr(request, self._body_field.name)
        target.data = data
        target.content_type = "" if content_type is None else content_type.decode("latin-1")

    def _bind_whole(self, variables: Variables, query: bytes, body: bytes, content_type: bytes | None) -> Message:
        if query:
            for name in _parse_query(query):
                raise _unknown_parameter(name, "this call takes no query parameters; give it in the body")
        if self._raw:
            request = self._class()
            self.raw_body(request, body, content_type)
        elif body:
            _check_json(content_type)
            value = loads(body)
            request = self._codec.decode(self._descriptor, value, loaded=True)
            if variables:
                self._refuse_conflicts(value, variables, "the path")
        else:
            request = self._codec.decode(self._descriptor, {})
        self._set_variables(request, variables)
        return request

    def _bind_field(self, request: Message, field: FieldDescriptor, body: bytes, content_type: bytes | None) -> None:
        if self._raw:
            self.raw_body(request, body, content_type)
            return
        if body:
            _check_json(content_type)
            self._codec.decode_field(request, field, loads(body), path=field.name, loaded=True)
        elif field.message_type is not None and not field.is_repeated:
            self._codec.decode_field(request, field, {})

    def _set_variables(self, request: Message, variables: Variables) -> None:
        for name, text in variables:
            if name in self._plain:
                setattr(request, name, text)
            else:
                self._codec.set_from_text(request, name, (text,))

    def _set_query(self, request: Message, query: bytes) -> None:
        for name, values in _parse_query(query).items():
            if name in self._paths:
                raise _unknown_parameter(name, "it is given by the path; leave it out of the query")
            if self._body_field is not None and name.partition(".")[0] == self._body:
                raise _unknown_parameter(name, "it is given by the body; leave it out of the query")
            self._codec.set_from_text(request, name, values)

    def _refuse_conflicts(self, value: object, variables: Variables, where: str) -> None:
        """Refuse a body with a field that path or query give: silently taking one of two would hide a mistake."""
        for name, _ in variables:
            held = value
            for part in name.split("."):
                held = held.get(part) if isinstance(held, dict) else None
            if held is not None:
                description = f"it is given by {where}; leave it out of the body"
                raise FleetError("INVALID_FIELD", f"{name}: {description}", violations=[Violation(name, description)])


def _is_plain_text(field: FieldDescriptor | None) -> bool:
    return field is not None and field.type == FieldDescriptor.TYPE_STRING and field.containing_oneof is None


def _parse_query(query: bytes) -> dict[str, list[str]]:
    if _BAD_ESCAPE.search(query) or not query.isascii():
        raise FleetError("INVALID_FIELD", "query: a malformed escape; percent-encode each value once, as UTF-8")
    try:
        pairs = parse_qsl(query.decode(), keep_blank_values=True, errors="strict", max_num_fields=_MAX_PARAMETERS)
    except UnicodeDecodeError:
        raise FleetError("INVALID_FIELD", "query: it is not UTF-8; percent-encode each value once, as UTF-8") from None
    except ValueError:
        raise FleetError("INVALID_FIELD", f"query: at most {_MAX_PARAMETERS} parameters are taken") from None
    found: dict[str, list[str]] = {}
    for name, value in pairs:
        if "\0" in value or "\0" in name:
            raise FleetError("INVALID_FIELD", "query: it must not hold NUL; leave it out")
        found.setdefault(name, []).append(value)
    return found


def _unknown_parameter(name: str, description: str) -> FleetError:
    return FleetError("UNKNOWN_FIELD", f"{name}: {description}", violations=[Violation(name, description)])


def _check_json(content_type: bytes | None) -> None:
    if content_type is None or not (content_type == b"application/json" or _JSON_TYPE.fullmatch(content_type)):
        raise FleetError("UNSUPPORTED_MEDIA_TYPE", "body: it must be JSON; send Content-Type: application/json")


def _refuse_body(body: bytes, content_type: bytes | None) -> None:
    """A body where none is taken: only `{}` may pass."""
    _check_json(content_type)
    value = loads(body)
    if value == {} and isinstance(value, dict):
        return
    if isinstance(value, dict):
        raise _unknown_parameter(next(iter(value)), "this call takes no body; give it in the query")
    raise FleetError("INVALID_FIELD", "body: this call takes none; leave it out")
