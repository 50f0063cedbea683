"""The documented service of the OpenAPI tests, compiled at test time with its comments."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from buf.validate import validate_pb2  # noqa: F401 - puts buf/validate into the pool
from fleet.transcode.v1 import options_pb2, rules_pb2  # noqa: F401 - and our options
from google.api import annotations_pb2, httpbody_pb2  # noqa: F401
from google.protobuf import descriptor_pool, duration_pb2, struct_pb2, timestamp_pb2, wrappers_pb2  # noqa: F401
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.message_factory import GetMessageClass
from grpc_tools import protoc

_PROTOS = Path(__file__).resolve().parents[1] / "protos"
_GENERATE = Path(__file__).resolve().parents[2] / "proto" / "generate.py"


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("proto_generate", _GENERATE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def compile_proto(name: str) -> FileDescriptorSet:
    """`tests/protos/<name>.proto` and all that it imports, with comments; its own file is added to the
    default pool.
    """
    with tempfile.TemporaryDirectory() as folder:
        third_party = _generator()._third_party_set(Path(folder))
        out = Path(folder) / "out.binpb"
        arguments = ["protoc", f"-I{_PROTOS}", f"-I{_GENERATE.parent}", f"--descriptor_set_in={third_party}"]
        arguments += ["--include_imports", "--include_source_info", f"--descriptor_set_out={out}", f"{name}.proto"]
        if protoc.main(arguments):
            raise RuntimeError(f"protoc refused tests/protos/{name}.proto")
        files = FileDescriptorSet.FromString(out.read_bytes())
    descriptor_pool.Default().AddSerializedFile(files.file[-1].SerializeToString())
    return files


def service(files: FileDescriptorSet, name: str) -> Any:
    """A service of the compiled file, from the default pool."""
    return descriptor_pool.Default().FindServiceByName(f"{files.file[-1].package}.{name}")


def message(files: FileDescriptorSet, name: str) -> Any:
    """A message class of the compiled file."""
    return GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(f"{files.file[-1].package}.{name}"))
