"""Payloads: free JSON from the caller, typed messages in the store and on the nodes."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from fleet.v1 import types_pb2
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

from fleet_server.domain.errors import FleetError, Violation, invalid_field
from fleet_server.protojson import JsonCodec, JsonError, apply_defaults, dumps, loads
from fleet_server.services.refusals import join
from fleet_server.services.words import type_word

MAX_PAYLOAD_BYTES = 1_000_000
SEED_SPAN = (1 << 53) - 64
"""Drawn seeds are below: exact in every JSON reader, for all 64 images of a group."""

_DEFAULT_STRENGTH = 0.75
_LONGEST_ESCAPE = 6
_DEEP = 200
_SAFE = float(1 << 53)


class Validate(Protocol):
    """Judges a message by its proto's rules. Raises FleetError INVALID_FIELD; `path` goes before the fields' paths."""

    def __call__(self, message: Message, *, path: str = "") -> None: ...


class PayloadReader:
    """Makes typed payloads: unknown fields refused, defaults filled in, rules held, seeds drawn.

    `draw(n)` gives a random integer from 0 to n - 1.
    """

    def __init__(self, codec: JsonCodec, validate: Validate, draw: Callable[[int], int]) -> None:
        self._codec = codec
        self._validate = validate
        self._draw = draw

    def read(
        self, job_type: int, payload: Struct, *, path: str = "payload", workflow: str | None = None
    ) -> types_pb2.Payload:
        """The payload of a queued job; `workflow` is the JSON text of a ComfyUI graph, where one was given.

        Raises INVALID_FIELD or UNKNOWN_FIELD; each names the field.
        """
        word = type_word(job_type)
        value = self._value(payload, path)
        typed = types_pb2.Payload()
        if word == "custom":
            _engine(value, path)
            typed.custom.CopyFrom(payload)
            return typed
        if workflow is not None:
            _workflow_alone(word, value, workflow, path)
            typed.workflow.workflow_json = workflow
            return typed
        if word in ("image_gen", "video_gen") and value.get("workflow") is not None:
            raise invalid_field(join(path, "workflow"), "must be an object: a graph in ComfyUI's API format")
        _seed_is_exact(value, path)
        message = getattr(typed, word)
        message.SetInParent()
        try:
            self._codec.decode_into(message, value, path=path)
        except JsonError as error:
            raise FleetError(error.reason, str(error), violations=[Violation(error.path, error.description)]) from error
        self._finish(message, path)
        return typed

    def image(self, request: Message, *, path: str = "") -> types_pb2.Payload:
        """The payload of a call that has the image fields itself, under the numbers of ImagePayload."""
        typed = types_pb2.Payload()
        message = typed.image_gen
        message.ParseFromString(request.SerializeToString())
        message.DiscardUnknownFields()
        self._finish(message, path)
        return typed

    def _value(self, payload: Struct, path: str) -> dict[str, Any]:
        try:
            value: Any = self._codec.encode(payload)
            size = payload.ByteSize()
            if size * _LONGEST_ESCAPE > MAX_PAYLOAD_BYTES:
                size = len(dumps(value))
        except ValueError:
            raise invalid_field(path, "must hold finite numbers only") from None
        if size > MAX_PAYLOAD_BYTES:
            raise invalid_field(path, f"must have at most {MAX_PAYLOAD_BYTES:,} bytes", f"{size:,}")
        found: dict[str, Any] = value
        return found

    def _finish(self, message: Any, path: str) -> None:
        apply_defaults(message)
        self._validate(message, path=path)
        match message:
            case types_pb2.ImagePayload():
                _pictures(message, path)
                self._draw_seed(message)
            case types_pb2.VideoPayload():
                _pictures(message, path)
                self._draw_seed(message)
            case types_pb2.ContainerPayload():
                _container(message, path)

    def _draw_seed(self, message: types_pb2.ImagePayload | types_pb2.VideoPayload) -> None:
        if not message.HasField("seed"):
            message.seed = self._draw(SEED_SPAN)


def model_of(payload: types_pb2.Payload) -> str | None:
    """The model that a payload names; None where it names none."""
    message = _inner(payload)
    if message is None or "model" not in message.DESCRIPTOR.fields_by_name or not message.HasField("model"):
        return None
    name: str = message.model
    return name


def loras_of(payload: types_pb2.Payload) -> Iterator[types_pb2.LoraUse]:
    """The LoRAs that a payload names."""
    kind = payload.WhichOneof("kind")
    if kind == "image_gen":
        yield from payload.image_gen.loras
    elif kind == "video_gen":
        yield from payload.video_gen.loras


def references_of(payload: types_pb2.Payload, *, path: str) -> Iterator[tuple[str, str]]:
    """Each reference to a file that a payload names, with its field's path."""
    kind = payload.WhichOneof("kind")
    if kind == "transcription":
        yield join(path, "audio"), payload.transcription.audio
    elif kind in ("image_gen", "video_gen"):
        message = getattr(payload, kind)
        for name in ("init_image", "mask_image"):
            if message.HasField(name):
                yield join(path, name), getattr(message, name)
    elif kind == "training":
        for index, reference in enumerate(payload.training.inputs):
            yield join(path, f"inputs[{index}]"), reference
    elif kind == "workflow":
        for one in payload.workflow.inputs:
            yield join(path, "workflow"), one.reference
    elif kind == "custom" and _for_container(payload.custom):
        # What is no text there, the node refuses.
        for index, value in enumerate(payload.custom.fields["inputs"].list_value.values):
            if value.HasField("string_value"):
                yield join(path, f"inputs[{index}]"), value.string_value


def _for_container(custom: Struct) -> bool:
    """Whether a free payload has the fields of training: it names the engine `container`, or none but an image."""
    if "inputs" not in custom.fields:
        return False
    named = custom.fields["engine"].string_value if "engine" in custom.fields else ""
    return named == "container" or (not named and "image" in custom.fields)


def payload_json(codec: JsonCodec, payload: types_pb2.Payload) -> Struct:
    """The payload as callers see it: what is set, by its JSON names."""
    if payload.WhichOneof("kind") == "custom":
        return payload.custom
    shown = Struct()
    if payload.WhichOneof("kind") == "workflow":
        codec.decode_into(shown, {"workflow": _shown(loads(payload.workflow.workflow_json.encode(), max_depth=_DEEP))})
        return shown
    message = _inner(payload)
    if message is not None:
        value: Any = codec.encode(message)
        codec.decode_into(shown, {name: item for name, item in value.items() if item is not None})
    return shown


def _inner(payload: types_pb2.Payload) -> Any:
    kind = payload.WhichOneof("kind")
    return None if kind is None else getattr(payload, kind)


def _workflow_alone(word: str, value: dict[str, Any], workflow: str, path: str) -> None:
    name = join(path, "workflow")
    if word not in ("image_gen", "video_gen"):
        raise invalid_field(name, "must be left out: graphs are for image_gen and video_gen")
    if value:
        raise invalid_field(join(path, next(iter(value))), "must be left out: `workflow` is given, and says it all")
    size = len(workflow.encode())
    if size > MAX_PAYLOAD_BYTES:
        raise invalid_field(name, f"must have at most {MAX_PAYLOAD_BYTES:,} bytes", f"{size:,}")


def _shown(value: Any) -> Any:
    """A graph for readers of JSON: integers that a double cannot hold are strings, as everywhere."""
    if isinstance(value, dict):
        return {name: _shown(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_shown(item) for item in value]
    return str(value) if isinstance(value, int) and abs(value) > _SAFE else value


def _seed_is_exact(value: dict[str, Any], path: str) -> None:
    """A Struct holds doubles: a larger seed has been rounded on its way, so it has to come as a string."""
    seed = value.get("seed")
    if isinstance(seed, float) and abs(seed) > _SAFE:
        raise invalid_field(join(path, "seed"), "must be a string above 2^53 (9007199254740992)")


def _engine(value: dict[str, Any], path: str) -> None:
    engine = value.get("engine")
    if engine is not None and (not isinstance(engine, str) or not engine):
        raise invalid_field(
            join(path, "engine"), "must name the engine that is handed the payload; container if left out"
        )


def _pictures(message: Any, path: str) -> None:
    """`strength` means nothing without a picture to start from, nor does a mask."""
    if message.HasField("init_image"):
        return
    if message.HasField("mask_image"):
        raise invalid_field(join(path, "mask_image"), "needs init_image: give both, or leave it out")
    if message.strength != _DEFAULT_STRENGTH:
        raise invalid_field(join(path, "strength"), "must be given with init_image only")
    message.ClearField("strength")


def _container(message: types_pb2.ContainerPayload, path: str) -> None:
    if message.HasField("command"):
        try:
            shlex.split(message.command)
        except ValueError as error:
            raise invalid_field(join(path, "command"), f"must be a shell-like command line ({error})") from None
    for index, mount in enumerate(message.mounts):
        host, _, inside = mount.removesuffix(":ro").partition(":")
        if not (host.startswith("/") and inside.startswith("/")) or ":" in inside:
            words = "must be /host:/container or /host:/container:ro"
            raise invalid_field(join(path, f"mounts[{index}]"), words)
    for name in message.env:
        if not name or "=" in name:
            raise invalid_field(join(path, "env"), "must have names without =")
