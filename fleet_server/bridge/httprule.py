"""The google.api.http rules of a method, checked against its messages, as a list of bindings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from google.api import annotations_pb2, http_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor

from fleet_server.bridge.template import Template, TemplateError, Variable, parse_template

__all__ = [
    "HTTP_BODY",
    "WEBSOCKET",
    "Binding",
    "HttpRuleError",
    "Template",
    "TemplateError",
    "parse_template",
    "rules_of",
    "takes_raw_body",
]

WEBSOCKET: Final = "WEBSOCKET"
"""The custom pattern's kind, and the `http_method`, of a WebSocket binding."""

HTTP_BODY: Final = "google.api.HttpBody"
"""The message whose bytes go in and out as they are."""

_TEXT_MESSAGES: Final = frozenset(
    f"google.protobuf.{name}"
    for name in (
        *("Timestamp", "Duration", "FieldMask", "DoubleValue", "FloatValue", "Int64Value", "UInt64Value"),
        *("Int32Value", "UInt32Value", "BoolValue", "StringValue", "BytesValue"),
    )
)
_CUSTOM_METHODS: Final = frozenset({"HEAD", "OPTIONS"})


class HttpRuleError(ValueError):
    """A rule that does not fit its method. The message names the method and what to change."""


@dataclass(frozen=True, slots=True, eq=False)
class Binding:
    """One HTTP address of one method. `body` is "", "*" or a field's name; `response_body` likewise, not "*".

    A binding is a WebSocket where its rule says so (custom kind WEBSOCKET) or where both sides of the method
    are streams; its `http_method` is then WEBSOCKET.
    """

    http_method: str
    template: Template
    method: MethodDescriptor
    body: str = ""
    response_body: str = ""
    websocket: bool = False
    rpc_path: str = field(init=False)

    def __post_init__(self) -> None:
        service = self.method.containing_service
        object.__setattr__(self, "rpc_path", f"/{service.full_name}/{self.method.name}")

    @property
    def body_field(self) -> FieldDescriptor | None:
        """The field that takes the body, None where the whole request or nothing does."""
        return self.method.input_type.fields_by_name[self.body] if self.body not in ("", "*") else None

    @property
    def response_field(self) -> FieldDescriptor | None:
        """The field of the reply that goes out in its place, None for the whole reply."""
        return self.method.output_type.fields_by_name[self.response_body] if self.response_body else None

    def __str__(self) -> str:
        return f"{self.http_method} {self.template} ({self.method.full_name})"


def rules_of(method: MethodDescriptor) -> list[Binding]:
    """The bindings of a method, its rule's first, then its additional ones; [] where it has no rule.

    Raises HttpRuleError or TemplateError where a rule is malformed or does not fit the method's messages.
    """
    options = method.GetOptions()
    if not options.HasExtension(annotations_pb2.http):
        return []
    rule = options.Extensions[annotations_pb2.http]
    bindings = [_binding(method, rule)]
    for extra in rule.additional_bindings:
        if extra.additional_bindings:
            raise HttpRuleError(f"{method.full_name}: additional_bindings must not hold any of their own")
        bindings.append(_binding(method, extra))
    return bindings


def _binding(method: MethodDescriptor, rule: http_pb2.HttpRule) -> Binding:
    pattern = rule.WhichOneof("pattern")
    if pattern is None:
        raise HttpRuleError(
            f"{method.full_name}: the http rule has no pattern; set get, put, post, delete, patch or custom"
        )
    if pattern == "custom":
        http_method, path = rule.custom.kind.upper(), rule.custom.path
        if http_method not in _CUSTOM_METHODS and http_method != WEBSOCKET:
            raise HttpRuleError(
                f"{method.full_name}: unknown custom kind {rule.custom.kind!r}; use WEBSOCKET, HEAD or OPTIONS"
            )
    else:
        http_method, path = pattern.upper(), getattr(rule, pattern)
    websocket = http_method == WEBSOCKET or (method.client_streaming and method.server_streaming)
    binding = Binding(
        http_method=WEBSOCKET if websocket else http_method,
        template=parse_template(path),
        method=method,
        body=rule.body,
        response_body=rule.response_body,
        websocket=websocket,
    )
    _check(binding)
    return binding


def _check(binding: Binding) -> None:
    method, request = binding.method, binding.method.input_type
    variables = binding.template.variables
    for variable in variables:
        _check_variable(binding, request, variable)
    if binding.body and binding.http_method in ("GET", "HEAD", "OPTIONS"):
        raise HttpRuleError(f"{binding}: a {binding.http_method} has no body; leave out body")
    if binding.body not in ("", "*"):
        if binding.body not in request.fields_by_name:
            raise HttpRuleError(f"{binding}: body {binding.body!r} is no field of {request.full_name}")
        if any(variable.field_path[0] == binding.body for variable in variables):
            raise HttpRuleError(f"{binding}: the field {binding.body!r} is bound to both the path and the body")
    reply = method.output_type
    if binding.response_body and binding.response_body not in reply.fields_by_name:
        raise HttpRuleError(f"{binding}: response_body {binding.response_body!r} is no field of {reply.full_name}")
    if binding.websocket and not method.server_streaming:
        raise HttpRuleError(f"{binding}: only a method with a stream of replies can be a WebSocket")
    if method.client_streaming and not binding.websocket and not takes_raw_body(binding):
        raise HttpRuleError(
            f"{binding}: a client stream has no HTTP form unless its body is a {HTTP_BODY}; "
            "use custom kind WEBSOCKET or leave out the rule"
        )


def _check_variable(binding: Binding, request: Descriptor, variable: Variable) -> None:
    message: Descriptor | None = request
    where = f"{binding}: the path variable {variable.name!r}"
    for name in variable.field_path:
        if message is None or name not in message.fields_by_name:
            owner = message.full_name if message is not None else "a field that is no message"
            raise HttpRuleError(f"{where} names {name!r}, which is no field of {owner}")
        leaf = message.fields_by_name[name]
        if leaf.is_repeated:
            raise HttpRuleError(f"{where} must not be repeated or a map")
        message = leaf.message_type
    if message is not None and message.full_name not in _TEXT_MESSAGES:
        raise HttpRuleError(f"{where} must not be a message")


def takes_raw_body(binding: Binding) -> bool:
    """Whether the request's body is bytes of any media type (a google.api.HttpBody)."""
    field = binding.body_field
    target = field.message_type if field is not None else binding.method.input_type if binding.body else None
    return target is not None and target.full_name == HTTP_BODY
