"""The message types that the converters are tried on."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import fleet.v1
from google.protobuf.descriptor import Descriptor, FileDescriptor

from tests.protos import load

BROKEN = {"BadDefault", "BadTag", "BadTagName"}
torture = load("torture")


def torture_types() -> list[Descriptor]:
    """Every message of the torture proto but those with broken options."""
    return [message for message in _messages(torture.DESCRIPTOR) if message.name not in BROKEN]


def product_types() -> list[Descriptor]:
    """Every message of fleet.v1."""
    found: list[Descriptor] = []
    for module in pkgutil.iter_modules(fleet.v1.__path__, "fleet.v1."):
        if module.name.endswith("_pb2"):
            found += _messages(importlib.import_module(module.name).DESCRIPTOR)
    return found


def _messages(file: FileDescriptor) -> Iterator[Descriptor]:
    waiting = list(file.message_types_by_name.values())
    while waiting:
        message = waiting.pop(0)
        if not message.GetOptions().map_entry:
            yield message
            waiting += message.nested_types
