"""From reply messages to bytes and headers: JSON, raw bytes, and the encodings that streams share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from fleet_server.bridge.context import Metadata
from fleet_server.bridge.errors import JSON_MEDIA_TYPE, Header
from fleet_server.bridge.httprule import HTTP_BODY, Binding
from fleet_server.domain.errors import FleetError
from fleet_server.protojson import JsonCodec, dumps

_STATUS_KEY: Final = "x-http-status"
_NOT_SENT: Final = frozenset(
    {"connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer", "x-request-id", _STATUS_KEY}
)
_SHARED_LIMIT: Final = 256


class Encoded:
    """One object of a stream in all forms that it is sent in; each form is made once."""

    def __init__(self, json: bytes, event_id: str | None) -> None:
        self.json = json
        self._event_id = event_id

    @cached_property
    def text(self) -> str:
        """A WebSocket frame."""
        return self.json.decode()

    @cached_property
    def line(self) -> bytes:
        """A line of NDJSON."""
        return self.json + b"\n"

    @cached_property
    def event(self) -> bytes:
        """An SSE event, with `id:` where the object has an id."""
        head = b"" if self._event_id is None else b"id: " + self._event_id.encode() + b"\n"
        return head + b"data: " + self.json + b"\n\n"


class SharedEncodings:
    """The latest encodings of objects that many streams yield, found by identity. Bounded; holds the objects it knows.

    Only for message types whose objects never change once yielded: a changed object would go out as it was.
    """

    def __init__(self, limit: int = _SHARED_LIMIT) -> None:
        self._limit = limit
        self._entries: OrderedDict[int, tuple[Message, Encoded]] = OrderedDict()

    def get(self, message: Message, encode: Callable[[Message], Encoded]) -> Encoded:
        """The encoding of this very object, made by `encode` where it is not known."""
        entry = self._entries.get(id(message))
        if entry is not None:
            return entry[1]
        encoded = encode(message)
        self._entries[id(message)] = (message, encoded)
        if len(self._entries) > self._limit:
            self._entries.popitem(last=False)
        return encoded


class ReplyEncoder:
    """Encodes the replies of one binding: the whole message, or the field that `response_body` names."""

    def __init__(self, binding: Binding, codec: JsonCodec, shared: SharedEncodings | None = None) -> None:
        field = binding.response_field
        target = binding.method.output_type if field is None else field.message_type
        single = target is not None and not (field is not None and field.is_repeated)
        self.raw = single and target is not None and target.full_name == HTTP_BODY
        self._codec = codec
        self._field = field
        self._shared = shared
        id_field = target.fields_by_name.get("id") if single and target is not None else None
        self._id_field = id_field if id_field is not None and _is_scalar(id_field) else None

    def unary(self, reply: Message) -> tuple[bytes, bytes]:
        """Body and content type of a reply."""
        if self.raw:
            body = self.http_body(reply)
            return body.data, _media_type(body.content_type)
        return self._json(reply), JSON_MEDIA_TYPE

    def http_body(self, reply: Message) -> Any:
        """The HttpBody of a raw reply."""
        return reply if self._field is None else getattr(reply, self._field.name)

    def item(self, reply: Message) -> Encoded:
        """One object of a stream."""
        return self._encode(reply) if self._shared is None else self._shared.get(reply, self._encode)

    def _encode(self, reply: Message) -> Encoded:
        return Encoded(self._json(reply), self._event_id(reply))

    def _json(self, reply: Message) -> bytes:
        if self._field is None:
            return self._codec.encode_bytes(reply)
        return dumps(self._codec.encode_field(reply, self._field))

    def _event_id(self, reply: Message) -> str | None:
        field = self._id_field
        if field is None:
            return None
        target: Any = reply if self._field is None else getattr(reply, self._field.name)
        if field.has_presence and not target.HasField("id"):
            return None
        text = str(target.id)
        return text if text and text.isprintable() else None


def _is_scalar(field: FieldDescriptor) -> bool:
    return not field.is_repeated and field.message_type is None and field.enum_type is None


def _media_type(content_type: str) -> bytes:
    return header_value("content-type", content_type) if content_type else b"application/octet-stream"


def reply_head(metadata: Metadata | None) -> tuple[int, list[Header]]:
    """HTTP status and headers of initial metadata. Raises FleetError INTERNAL where it cannot be sent as headers."""
    status, headers = 200, []
    for key, value in metadata or ():
        if key == _STATUS_KEY:
            status = int(value)
        elif key not in _NOT_SENT and not key.startswith("grpc-"):
            headers.append((key.lower().encode("ascii"), header_value(key, value)))
    return status, headers


def header_value(key: str, value: str | bytes) -> bytes:
    """The bytes of a header's value: Latin-1, else UTF-8. Raises FleetError INTERNAL for control characters."""
    raw = value if isinstance(value, bytes) else _header_bytes(value)
    if any((byte < 0x20 and byte != 0x09) or byte == 0x7F for byte in raw):
        raise FleetError("INTERNAL", f"the reply's header {key} holds control characters")
    return raw


def _header_bytes(value: str) -> bytes:
    try:
        return value.encode("latin-1")
    except UnicodeEncodeError:
        return value.encode()
