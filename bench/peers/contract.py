"""`jobs.proto`, compiled when it is imported: descriptors and message classes, and the set that Envoy reads."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from buf.validate import validate_pb2
from google.api import annotations_pb2
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory, struct_pb2, timestamp_pb2

from bench.peers.sample import JOB

_HERE = Path(__file__).resolve().parent
_NAME = "jobs.proto"


def _imports() -> descriptor_pb2.FileDescriptorSet:
    """Everything that the proto may import, from the installed modules."""
    found: dict[str, Any] = {}

    def add(file: Any) -> None:
        if file.name not in found:
            for inner in file.dependencies:
                add(inner)
            found[file.name] = file

    for module in (validate_pb2, annotations_pb2, struct_pb2, timestamp_pb2):
        add(module.DESCRIPTOR)
    files = [descriptor_pb2.FileDescriptorProto.FromString(file.serialized_pb) for file in found.values()]
    return descriptor_pb2.FileDescriptorSet(file=files)


def _compiled() -> descriptor_pb2.FileDescriptorSet:
    with tempfile.TemporaryDirectory() as folder:
        imports, compiled = Path(folder) / "imports.binpb", Path(folder) / "jobs.binpb"
        imports.write_bytes(_imports().SerializeToString())
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{_HERE}", f"--descriptor_set_in={imports}"]
        subprocess.run(
            [*command, "--include_imports", f"--descriptor_set_out={compiled}", _NAME], check=True, timeout=60
        )
        return descriptor_pb2.FileDescriptorSet.FromString(compiled.read_bytes())


IMAGE = _compiled()
"""The proto and all that it imports."""

_POOL = descriptor_pool.Default()
_POOL.AddSerializedFile(IMAGE.file[-1].SerializeToString())
SERVICE = _POOL.FindServiceByName("fleet.bench.Jobs")
Job: Any = message_factory.GetMessageClass(_POOL.FindMessageTypeByName("fleet.bench.Job"))
GetJobRequest: Any = message_factory.GetMessageClass(_POOL.FindMessageTypeByName("fleet.bench.GetJobRequest"))
CreateJobRequest: Any = message_factory.GetMessageClass(_POOL.FindMessageTypeByName("fleet.bench.CreateJobRequest"))


def sample() -> Any:
    """The job that every peer answers with."""
    return json_format.ParseDict({**JOB, "state": JOB["state"].upper()}, Job())
