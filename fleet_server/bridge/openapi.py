"""OpenAPI 3.1 of the bindings that the bridge serves, made from descriptors, http rules, limits and
comments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from fleet.transcode.v1 import options_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from fleet_server.bridge.comments import comments_of
from fleet_server.bridge.errors import status_of
from fleet_server.bridge.httprule import HTTP_BODY, Binding, rules_of, takes_raw_body
from fleet_server.bridge.openapi_rules import Schema, is_required, rules_of_field, value_schema
from fleet_server.bridge.openapi_schemas import SchemaBuilder
from fleet_server.bridge.special import SpecialRoute
from fleet_server.bridge.template import DoubleWildcard, Literal, Variable
from fleet_server.domain.errors import Code, FleetError
from fleet_server.protojson import FieldKind, Kind, field_kind

UNIVERSAL_REASONS: Final = (
    *("INVALID_FIELD", "UNKNOWN_FIELD", "MALFORMED_JSON", "INVALID_PATH", "API_KEY_MISSING", "API_KEY_INVALID"),
    *("SCOPE_MISSING", "HOST_FORBIDDEN", "ORIGIN_FORBIDDEN", "ROUTE_NOT_FOUND", "METHOD_NOT_ALLOWED"),
    *("REQUEST_TIMEOUT", "BODY_TOO_LARGE", "UNSUPPORTED_MEDIA_TYPE", "RATE_LIMITED", "TOO_MANY_CONNECTIONS"),
    *("HEADERS_TOO_LARGE", "INTERNAL", "STORE_UNAVAILABLE", "SHUTTING_DOWN", "TIMEOUT"),
)
"""What every call can answer."""

_ANY_BYTES: Final = ("*/*",)
_PATH_TEXT: Final = "^[^/\\\\\\u0000]+$"
_NOT_TEXT: Final = frozenset({Kind.MESSAGE, Kind.ANY, Kind.STRUCT, Kind.VALUE, Kind.LIST_VALUE, Kind.NULL})
_STATUS_TEXTS: Final = {
    400: "The request is wrong; `violations` name the fields.",
    401: "A key is needed, or it is not valid.",
    403: "Not allowed: the key's scopes, the Host or the Origin.",
    404: "There is no such thing, or no such path.",
    405: "The path has no such method; `Allow` lists those it has.",
    408: "The request came too slowly.",
    409: "Not in this state.",
    413: "The body is too large.",
    415: "The body is not of the media type that is taken.",
    416: "The file has no such range.",
    429: "Too many at once; `Retry-After` says when to try again.",
    431: "The headers are too large.",
    500: "The call failed.",
    501: "Not in this version.",
    503: "Something needed is not there; `Retry-After` says when to try again.",
    504: "The deadline passed.",
}


@dataclass(frozen=True, slots=True)
class OpenApiOptions:
    """What the document says beyond the descriptors.

    `reason_codes`: the code of each reason. `files`: descriptors with source info, for descriptions.
    `variants`: for a free-object field (full name) the messages it may hold. `media_types`: for a method
    (full name) that answers bytes, their media types. `special`: routes beside the methods.
    """

    title: str
    version: str
    reason_codes: Mapping[str, Code]
    description: str = ""
    universal_reasons: Sequence[str] = UNIVERSAL_REASONS
    files: FileDescriptorSet | None = None
    variants: Mapping[str, Sequence[Descriptor]] = field(default_factory=dict)
    media_types: Mapping[str, Sequence[str]] = field(default_factory=dict)
    special: Sequence[SpecialRoute] = ()


def openapi_document(services: Sequence[ServiceDescriptor], options: OpenApiOptions) -> dict[str, Any]:
    """The document, ready for JSON. The same input gives the same document, key by key.

    WebSockets, which OpenAPI cannot describe, stand in the extension `x-websockets`. Raises ValueError for
    a reason without a code, and for what `rules_of` refuses.
    """
    return _Document(services, options).build()


class _Document:
    def __init__(self, services: Sequence[ServiceDescriptor], options: OpenApiOptions) -> None:
        self._services = services
        self._options = options
        self._comments = comments_of(options.files)
        package = services[0].full_name.rpartition(".")[0] if services else ""
        methods = [method for service in services for method in service.methods]
        self._schemas = SchemaBuilder(
            package, self._comments, options.variants, _reached(method.output_type for method in methods)
        )
        self._responses: dict[str, Any] = {}

    def build(self) -> dict[str, Any]:
        paths: dict[str, dict[str, Any]] = {}
        sockets: list[dict[str, Any]] = []
        self._schemas.components["Error"] = _ERROR
        for service in self._services:
            for method in service.methods:
                for index, binding in enumerate(rules_of(method)):
                    name = f"{service.name}_{method.name}" + (f"_{index + 1}" if index else "")
                    if binding.websocket:
                        sockets.append(self._socket(binding, name))
                    else:
                        item = paths.setdefault(_openapi_path(binding), {})
                        item[binding.http_method.lower()] = self._operation(binding, name)
        for route in self._options.special:
            paths.setdefault(route.path, {})[route.method.lower()] = self._special(route)
        info = {"title": self._options.title, "version": self._options.version}
        document: dict[str, Any] = {
            "openapi": "3.1.0",
            "info": info | ({"description": self._options.description} if self._options.description else {}),
            "servers": [{"url": "/"}],
            "tags": [self._schemas.described({"name": s.name}, s.full_name) for s in self._services],
            "paths": paths,
            "components": {
                "schemas": dict(sorted(self._schemas.components.items())),
                "responses": dict(sorted(self._responses.items())),
                "headers": _HEADERS,
                "securitySchemes": _SECURITY_SCHEMES,
            },
            "security": [{}, *({name: []} for name in _SECURITY_SCHEMES)],
        }
        return document | ({"x-websockets": sockets} if sockets else {})

    def _operation(self, binding: Binding, operation_id: str) -> dict[str, Any]:
        operation = self._head(binding, operation_id)
        parameters = [*self._path_parameters(binding), *self._query_parameters(binding)]
        if parameters:
            operation["parameters"] = parameters
        if binding.body:
            operation["requestBody"] = self._body(binding)
        operation["responses"] = {**self._success(binding), **self._errors(binding)}
        return operation

    def _head(self, binding: Binding, operation_id: str) -> dict[str, Any]:
        method = binding.method
        text = self._comments.get(method.full_name, "")
        first, _, rest = text.partition(". ")
        head: dict[str, Any] = {"operationId": operation_id, "tags": [method.containing_service.name]}
        if text:
            head["summary"] = first.rstrip(".")
        if rest or "\n" in text:
            head["description"] = text
        if method.GetOptions().deprecated:
            head["deprecated"] = True
        return head

    # What goes in.

    def _path_parameters(self, binding: Binding) -> Iterator[dict[str, Any]]:
        for variable in binding.template.variables:
            leaf = _leaf(binding.method.input_type, variable.field_path)
            for name, piece in _placeholders(variable):
                schema = self._text_schema(leaf)
                if schema.get("type") == "string" and not isinstance(piece, DoubleWildcard):
                    schema = {**schema, "minLength": max(1, schema.get("minLength", 1))}
                    if schema.get("pattern") == "^[^\\u0000]*$":
                        schema["pattern"] = _PATH_TEXT
                parameter: dict[str, Any] = {"name": name, "in": "path", "required": True, "schema": schema}
                if isinstance(piece, DoubleWildcard):
                    parameter["x-multi-segment"] = True
                yield self._schemas.described(parameter, leaf.full_name)

    def _query_parameters(self, binding: Binding) -> Iterator[dict[str, Any]]:
        if binding.body == "*":
            return
        taken = {variable.name for variable in binding.template.variables} | ({binding.body} if binding.body else set())
        yield from self._in_query(binding.method.input_type, "", taken, ())

    def _in_query(
        self, message: Descriptor, prefix: str, taken: set[str], inside: tuple[str, ...]
    ) -> Iterator[dict[str, Any]]:
        for leaf in message.fields:
            name, kind = prefix + leaf.name, field_kind(leaf)
            if name in taken or kind.map_key is not None:
                continue
            if kind.kind is Kind.MESSAGE and not kind.repeated and not kind.wrapped and kind.message is not None:
                if kind.message.full_name not in inside:
                    deeper = (*inside, message.full_name)
                    yield from self._in_query(kind.message, f"{name}.", taken, deeper)
            elif kind.kind not in _NOT_TEXT:
                yield self._query_parameter(name, leaf, kind, nested=bool(prefix))

    def _query_parameter(self, name: str, leaf: FieldDescriptor, kind: FieldKind, *, nested: bool) -> dict[str, Any]:
        schema = self._text_schema(leaf)
        parameter: dict[str, Any] = {"name": name, "in": "query"}
        if kind.repeated:
            rules = rules_of_field(leaf).repeated
            schema = {"type": "array", "items": schema}
            schema |= {"minItems": rules.min_items} if rules.min_items else {}
            schema |= {"maxItems": rules.max_items} if rules.max_items else {}
            parameter |= {"style": "form", "explode": True}
        if is_required(leaf, kind) and not nested:
            parameter["required"] = True
        else:
            schema |= self._schemas.default(leaf, kind)
        return self._schemas.described({**parameter, "schema": schema}, leaf.full_name)

    def _text_schema(self, leaf: FieldDescriptor) -> Schema:
        """One value as text in a path or query."""
        kind, rules = field_kind(leaf), rules_of_field(leaf)
        if kind.repeated:
            rules = rules.repeated.items
        if kind.kind in (Kind.TIMESTAMP, Kind.DURATION, Kind.FIELD_MASK) and kind.message is not None:
            return dict(self._schemas.request(kind.message))
        return value_schema(kind, rules, as_text=True)

    def _body(self, binding: Binding) -> dict[str, Any]:
        message, body_field = binding.method.input_type, binding.body_field
        if takes_raw_body(binding):
            return {"content": {"*/*": {"schema": {}}}}
        if body_field is None:
            without = frozenset(v.field_path[0] for v in binding.template.variables if len(v.field_path) == 1)
            required = self._schemas.is_body_required(message, without)
            schema = self._schemas.request(message, without)
        else:
            inner = body_field.message_type
            single = inner is not None and not body_field.is_repeated
            required = self._schemas.is_body_required(inner) if single and inner is not None else False
            schema = (
                self._schemas.request(inner)
                if single and inner is not None
                else self._schemas.request_field(body_field)
            )
        return {"required": required, "content": {"application/json": {"schema": schema}}}

    # What comes out.

    def _success(self, binding: Binding) -> dict[str, Any]:
        method, reply_field = binding.method, binding.response_field
        target = method.output_type if reply_field is None else reply_field.message_type
        raw = target is not None and target.full_name == HTTP_BODY
        reply: dict[str, Any] = {"description": "Done.", "headers": {"X-Request-Id": _header("X-Request-Id")}}
        if raw:
            types = self._options.media_types.get(method.full_name, _ANY_BYTES)
            reply["description"] = "The bytes."
            reply["content"] = {media_type: {"schema": {"type": "string", "format": "binary"}} for media_type in types}
            if method.server_streaming:
                partial = {**reply, "description": "The bytes of the range that was asked for."}
                not_modified = {"description": "What the caller has is what there is.", "headers": reply["headers"]}
                return {"200": reply, "206": partial, "304": not_modified}
            return {"200": reply}
        if reply_field is None:
            schema = self._schemas.reply(method.output_type)
        else:
            single = target is not None and not reply_field.is_repeated
            schema = (
                self._schemas.reply(target) if single and target is not None else self._schemas.reply_field(reply_field)
            )
        if not method.server_streaming:
            return {"200": {**reply, "content": {"application/json": {"schema": schema}}}}
        reply["description"] = (
            "A stream of objects: one a line, or one an event. An error after the start is the last object."
        )
        content = {"schema": {"type": "string"}, "x-item-schema": schema}
        return {"200": {**reply, "content": {"application/x-ndjson": content, "text/event-stream": content}}}

    def _errors(self, binding: Binding) -> dict[str, Any]:
        own = binding.method.GetOptions().Extensions[options_pb2.method].reasons
        by_status: dict[int, list[str]] = {}
        for reason in (*self._options.universal_reasons, *own):
            reasons = by_status.setdefault(self._status(reason, binding), [])
            if reason not in reasons:
                reasons.append(reason)
        universal = set(self._options.universal_reasons)
        errors: dict[str, Any] = {}
        for status, reasons in sorted(by_status.items()):
            reply = _error_reply(status, reasons)
            if universal.issuperset(reasons):
                self._responses.setdefault(f"Error{status}", reply)
                reply = {"$ref": f"#/components/responses/Error{status}"}
            errors[str(status)] = reply
        return errors

    def _status(self, reason: str, binding: Binding) -> int:
        code = self._options.reason_codes.get(reason)
        if code is None:
            raise ValueError(
                f"{binding.method.full_name}: the reason {reason} has no code; add it to the server's reasons"
            )
        return status_of(FleetError(reason, "", code=code))

    # What is neither.

    def _socket(self, binding: Binding, operation_id: str) -> dict[str, Any]:
        socket = {"path": _openapi_path(binding), **self._head(binding, operation_id)}
        parameters = [*self._path_parameters(binding), *self._query_parameters(binding)]
        if parameters:
            socket["parameters"] = parameters
        if binding.method.client_streaming:
            socket["send"] = self._schemas.request(binding.method.input_type)
        return socket | {"receive": self._schemas.reply(binding.method.output_type)}

    @staticmethod
    def _special(route: SpecialRoute) -> dict[str, Any]:
        return {
            "operationId": "special" + route.path.replace("/", "_").replace(".", "_"),
            "tags": ["Pages"],
            "summary": route.reason,
            "responses": {"200": {"description": "Done.", "content": {"*/*": {"schema": {}}}}},
        }


def _openapi_path(binding: Binding) -> str:
    parts = []
    for segment in binding.template.segments:
        if isinstance(segment, Variable):
            names = iter(_placeholders(segment))
            parts += [p.text if isinstance(p, Literal) else f"{{{next(names)[0]}}}" for p in segment.pieces]
        else:
            parts.append(str(segment))
    verb = f":{binding.template.verb}" if binding.template.verb else ""
    return "/" + "/".join(parts) + verb


def _placeholders(variable: Variable) -> list[tuple[str, Any]]:
    """The path parameters that stand for a variable: its own name, numbered where it has several wildcards."""
    wild = [piece for piece in variable.pieces if not isinstance(piece, Literal)]
    if len(wild) == 1:
        return [(variable.name, wild[0])]
    return [(f"{variable.name}_{index + 1}", piece) for index, piece in enumerate(wild)]


def _leaf(message: Descriptor, path: Sequence[str]) -> FieldDescriptor:
    for name in path[:-1]:
        inner = message.fields_by_name[name].message_type
        assert inner is not None  # the rule was checked
        message = inner
    return message.fields_by_name[path[-1]]


def _reached(messages: Iterable[Descriptor]) -> list[Descriptor]:
    found: dict[str, Descriptor] = {}
    waiting = list(messages)
    while waiting:
        message = waiting.pop()
        if message.full_name not in found:
            found[message.full_name] = message
            waiting += [field.message_type for field in message.fields if field.message_type is not None]
    return list(found.values())


def _header(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/headers/{name}"}


def _error_reply(status: int, reasons: Sequence[str]) -> dict[str, Any]:
    names = ["X-Request-Id", *({405: ["Allow"], 429: ["Retry-After"], 503: ["Retry-After"]}.get(status, []))]
    return {
        "description": f"{_STATUS_TEXTS.get(status, 'The call failed.')} Reasons: {', '.join(reasons)}.",
        "headers": {name: _header(name) for name in names},
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }


_ERROR: Final[Schema] = {
    "type": "object",
    "description": "The body of every error.",
    "properties": {
        "detail": {
            "type": "string",
            "description": "A sentence for people; begins with the field at fault, if one is.",
        },
        "code": {"type": "string", "description": "The name of the gRPC status code."},
        "reason": {"type": "string", "description": "A stable word for programs."},
        "request_id": {"type": "string", "description": "The X-Request-Id, for the logs."},
        "violations": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"field": {"type": "string"}, "description": {"type": "string"}},
                "required": ["field", "description"],
            },
        },
    },
    "required": ["detail", "code", "reason", "request_id", "violations"],
}
_HEADERS: Final = {
    "X-Request-Id": {"description": "The caller's, or a new one.", "schema": {"type": "string"}},
    "Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}},
    "Allow": {"description": "The methods of this path.", "schema": {"type": "string"}},
}
_SECURITY_SCHEMES: Final = {
    "ApiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "Bearer": {"type": "http", "scheme": "bearer"},
}
