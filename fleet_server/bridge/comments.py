"""Comments of .proto files by full name, from a descriptor set that kept them (`--include_source_info`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)

_MESSAGE, _ENUM, _SERVICE = 4, 5, 6  # fields of FileDescriptorProto
_FIELD, _NESTED, _NESTED_ENUM, _ONEOF = 2, 3, 4, 8  # of DescriptorProto
_METHOD: Final = 2  # of ServiceDescriptorProto
_VALUE: Final = 2  # of EnumDescriptorProto
_FOR_TOOLS: Final = ("buf:lint:", "protolint:", "@@protoc")

Path = tuple[int, ...]


def comments_of(files: FileDescriptorSet | None) -> Mapping[str, str]:
    """Leading comments by full name (`fleet.v1.Job.status`; values of enums as
    `fleet.v1.JobStatus.JOB_STATUS_QUEUED`), their lines joined, blank lines kept, lines for tools left out.
    Empty where `files` is None or has no comments.
    """
    found: dict[str, str] = {}
    for file in files.file if files is not None else ():
        texts = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}
        for path, name in _places(file):
            text = _clean(texts.get(path, ""))
            if text:
                found[name] = text
    return found


def _places(file: FileDescriptorProto) -> Iterator[tuple[Path, str]]:
    scope = f"{file.package}." if file.package else ""
    for index, message in enumerate(file.message_type):
        yield from _in_message((_MESSAGE, index), scope, message)
    for index, enum in enumerate(file.enum_type):
        yield from _in_enum((_ENUM, index), scope, enum)
    for index, service in enumerate(file.service):
        path: Path = (_SERVICE, index)
        yield path, scope + service.name
        for number, method in enumerate(service.method):
            yield (*path, _METHOD, number), f"{scope}{service.name}.{method.name}"


def _in_message(path: Path, scope: str, message: DescriptorProto) -> Iterator[tuple[Path, str]]:
    name = scope + message.name
    yield path, name
    for index, field in enumerate(message.field):
        yield (*path, _FIELD, index), f"{name}.{field.name}"
    for index, oneof in enumerate(message.oneof_decl):
        yield (*path, _ONEOF, index), f"{name}.{oneof.name}"
    for index, inner in enumerate(message.nested_type):
        yield from _in_message((*path, _NESTED, index), f"{name}.", inner)
    for index, enum in enumerate(message.enum_type):
        yield from _in_enum((*path, _NESTED_ENUM, index), f"{name}.", enum)


def _in_enum(path: Path, scope: str, enum: EnumDescriptorProto) -> Iterator[tuple[Path, str]]:
    name = scope + enum.name
    yield path, name
    for index, value in enumerate(enum.value):
        yield (*path, _VALUE, index), f"{name}.{value.name}"


def _clean(text: str) -> str:
    lines = [line.strip() for line in text.splitlines()]
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if not line:
            paragraphs.append([])
        elif not line.startswith(_FOR_TOOLS):
            paragraphs[-1].append(line)
    return "\n\n".join(" ".join(part) for part in paragraphs if part)
