"""Services made on the spot, for rules that no committed proto could have."""

from __future__ import annotations

import itertools
from typing import Any

from google.api import annotations_pb2, http_pb2
from google.protobuf import descriptor_pb2, descriptor_pool, wrappers_pb2

from tests.bridge.library import pb

_numbers = itertools.count()
_BOOK = "." + pb.Book.DESCRIPTOR.full_name
_RAW = "." + pb.RawRequest.DESCRIPTOR.full_name
_LIST = "." + pb.ListBooksRequest.DESCRIPTOR.full_name
assert wrappers_pb2.DESCRIPTOR


def service_of(*rules: http_pb2.HttpRule, request: str = _BOOK, client: bool = False, server: bool = False) -> Any:
    """A service with one method a rule: Book in (or `request`), Book out."""
    number = next(_numbers)
    file = descriptor_pb2.FileDescriptorProto(
        name=f"dynamic{number}.proto", package=f"dynamic{number}", syntax="proto3"
    )
    file.dependency.extend([pb.DESCRIPTOR.name, annotations_pb2.DESCRIPTOR.name])
    service = file.service.add(name="Service")
    for index, rule in enumerate(rules):
        method = service.method.add(name=f"Method{index}", input_type=request, output_type=_BOOK)
        method.client_streaming, method.server_streaming = client, server
        method.options.Extensions[annotations_pb2.http].CopyFrom(rule)
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    return pool.FindServiceByName(f"dynamic{number}.Service")


def get(path: str, **more: Any) -> http_pb2.HttpRule:
    """A GET rule."""
    return http_pb2.HttpRule(get=path, **more)


def post(path: str, **more: Any) -> http_pb2.HttpRule:
    """A POST rule."""
    return http_pb2.HttpRule(post=path, **more)


def custom(kind: str, path: str) -> http_pb2.HttpRule:
    """A rule of a custom pattern."""
    return http_pb2.HttpRule(custom=http_pb2.CustomHttpPattern(kind=kind, path=path))


RAW_REQUEST = _RAW
LIST_REQUEST = _LIST
