"""The codec: one door to the compiled converters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from fleet_server.protojson import text
from fleet_server.protojson.decode import Decoder, decoder, field_decoder
from fleet_server.protojson.encode import encode, encoder, field_encoder
from fleet_server.protojson.errors import JsonError
from fleet_server.protojson.loads import check_texts, dumps


class JsonCodec:
    """Protobuf messages to and from JSON values (what `loads` returns and `dumps` takes).

    JSON has the proto's field names, every field of a printed message, enum values by their short words,
    64-bit integers as numbers within 2^53 and as strings beyond, and null for what is unset. Reading refuses
    unknown fields, null in lists, strings for 32-bit numbers and floats, and two members of a oneof. Readers
    raise JsonError, whose path begins with the `path` that was passed. Converters are compiled at their first
    use and shared; any thread may use them.
    """

    def prepare(self, descriptors: Iterable[Descriptor]) -> None:
        """Compiles both directions ahead, so that the first request is not slower and a bad option shows at
        start.

        Raises ValueError for an option that does not fit its message.
        """
        for descriptor in descriptors:
            encoder(descriptor)
            decoder(descriptor)

    def decode(self, descriptor: Descriptor, value: object, *, path: str = "", loaded: bool = False) -> Message:
        """A new message of this type. What `loads` has read is `loaded`: its texts are good."""
        message: Message = message_factory.GetMessageClass(descriptor)()
        _fill(decoder(descriptor), message, value, path, loaded)
        return message

    def decode_into(self, message: Message, value: object, *, path: str = "") -> None:
        """Sets what `value` holds; lists and maps are replaced, messages merged, the rest is left as it is.
        After an error the message is half filled.
        """
        descriptor: Any = message.DESCRIPTOR
        _fill(decoder(descriptor), message, value, path, False)

    def decode_field(
        self, message: Message, field: FieldDescriptor, value: object, *, path: str = "", loaded: bool = False
    ) -> None:
        """Sets one field of `message` from that field's own JSON; null leaves it alone. `loaded` as in `decode`."""
        if value is not None:
            _fill(field_decoder(field), message, value, path, loaded)

    def set_from_text(self, message: Message, field_path: str, values: Sequence[str]) -> None:
        """Sets a field from query or path text; see `text.set_from_text`."""
        text.set_from_text(message, field_path, values)

    def encode(self, message: Message) -> object:
        """The message as a JSON value. Raises ValueError for what JSON cannot hold (see `encode.encode`)."""
        return encode(message)

    def encode_bytes(self, message: Message) -> bytes:
        """The message as JSON text, UTF-8."""
        return dumps(encode(message))

    def encode_field(self, message: Message, field: FieldDescriptor) -> object:
        """One field of the message as a JSON value, null where it is unset."""
        return field_encoder(field)(message)


def _fill(read: Decoder, message: Message, value: object, path: str, loaded: bool) -> None:
    try:
        try:
            read(value, message)
        except UnicodeEncodeError:
            loaded = False  # protobuf takes no half of a surrogate pair either
        if not loaded:
            check_texts(value)
    except JsonError as error:
        error.within(path)
        raise
