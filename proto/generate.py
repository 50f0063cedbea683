"""Generates the Python stubs under clients/python from the .proto files here.

Third-party protos come from their packages: google/api from googleapis-common-protos, buf/validate as the descriptor inside
the protovalidate wheel. `python proto/generate.py [OUTPUT_FOLDER]`; the folder is clients/python unless given.
"""

from __future__ import annotations

import importlib.resources
import sys
import tempfile
from pathlib import Path

import google.api
from google.protobuf import descriptor_pb2
from grpc_tools import protoc
from protovalidate._gen.buf.validate import validate_pb

PROTO = Path(__file__).resolve().parent
OWN = "fleet"
VALIDATE = "buf/validate/validate.proto"


def _include_folders() -> list[Path]:
    """Folders that hold google/protobuf and google/api."""
    api = Path(next(iter(google.api.__path__))).parent.parent
    return [Path(str(importlib.resources.files("grpc_tools") / "_proto")), api]


def _third_party_set(folder: Path) -> Path:
    """A descriptor set with every file that ours import but do not own, buf/validate included."""
    plain = folder / "plain.binpb"
    includes = [f"-I{path}" for path in _include_folders()]
    wanted = ["google/api/annotations.proto", "google/api/httpbody.proto", "google/protobuf/struct.proto"]
    wanted += ["google/protobuf/timestamp.proto", "google/protobuf/duration.proto", "google/protobuf/descriptor.proto"]
    wanted += ["google/protobuf/empty.proto", "google/protobuf/any.proto", "google/protobuf/field_mask.proto"]
    wanted += ["google/protobuf/wrappers.proto", "google/api/field_behavior.proto"]
    if protoc.main(["protoc", *includes, "--include_imports", f"--descriptor_set_out={plain}", *wanted]):
        raise SystemExit("protoc could not read the third-party protos")
    files = descriptor_pb2.FileDescriptorSet.FromString(plain.read_bytes())
    files.file.append(descriptor_pb2.FileDescriptorProto.FromString(validate_pb._DESC.proto.to_binary()))
    whole = folder / "third_party.binpb"
    whole.write_bytes(files.SerializeToString())
    return whole


def generate(output: Path) -> None:
    """Writes messages, gRPC stubs and type stubs of every proto here into `output`."""
    sources = sorted(str(path.relative_to(PROTO)) for path in (PROTO / OWN).rglob("*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        third_party = _third_party_set(Path(scratch))
        common = ["protoc", f"-I{PROTO}", f"--descriptor_set_in={third_party}"]
        own = [f"--python_out={output}", f"--grpc_python_out={output}", f"--mypy_out={output}", f"--mypy_grpc_out={output}"]
        # protoc wants our files from -I and the others from the set; validate.proto gets messages alone.
        if protoc.main([*common, *own, *sources]):
            raise SystemExit("protoc refused the protos")
        if protoc.main([*common, f"--python_out={output}", f"--mypy_out={output}", VALIDATE]):
            raise SystemExit("protoc refused buf/validate")
    for folder in {path.parent for path in output.rglob("*_pb2.py")}:
        for package in [folder, *folder.parents]:
            if package == output:
                break
            (package / "__init__.py").touch()
            (package / "py.typed").touch()
    for leftover in output.rglob("*_pb2_grpc.py"):
        if "add_" not in leftover.read_text():
            leftover.unlink()
            leftover.with_suffix(".pyi").unlink(missing_ok=True)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PROTO.parent / "clients" / "python"
    target.mkdir(parents=True, exist_ok=True)
    generate(target)
