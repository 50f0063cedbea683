"""Generates what is made from the .proto files here: Python stubs, a descriptor set, and the image that buf checks.

    python proto/generate.py [FOLDER]       write into FOLDER (clients/python unless given)
    python proto/generate.py --check        fail where clients/python differs from what would be written
    python proto/generate.py --image FILE   write the protos and their imports as a buf image

Third-party protos are never copied in: google/api comes from googleapis-common-protos, buf/validate is the descriptor
inside the protovalidate wheel. With the locked versions the output is the same byte for byte on every machine.
"""

from __future__ import annotations

import argparse
import importlib.resources
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import google.api
from google.protobuf import descriptor_pb2
from grpc_tools import protoc
from protovalidate._gen.buf.validate import validate_pb

PROTO = Path(__file__).resolve().parent
STUBS = PROTO.parent / "clients" / "python"
OWN = "fleet"
VALIDATE = "buf/validate/validate.proto"
DESCRIPTORS = "fleet/v1/descriptors.binpb"
GENERATED_PACKAGES = ("fleet", "buf")

# Every third-party file that ours may import; google/api and google/protobuf alone, buf/validate is added to them.
THIRD_PARTY = (
    "google/api/annotations.proto",
    "google/api/field_behavior.proto",
    "google/api/httpbody.proto",
    "google/protobuf/any.proto",
    "google/protobuf/descriptor.proto",
    "google/protobuf/duration.proto",
    "google/protobuf/empty.proto",
    "google/protobuf/field_mask.proto",
    "google/protobuf/struct.proto",
    "google/protobuf/timestamp.proto",
    "google/protobuf/wrappers.proto",
)

# Field 8042 of a FileDescriptorProto is buf's ImageFileExtension; its field 1 is `is_import = true`.
IS_IMPORT = bytes((0xD2, 0xF6, 0x03, 0x02, 0x08, 0x01))


def _protoc(what: str, *arguments: str) -> None:
    if protoc.main(["protoc", *arguments]):
        raise SystemExit(f"protoc failed on {what}: see its message above")


def _plugin(name: str) -> str:
    """The plug-in beside this interpreter, whether or not its environment is activated."""
    return f"--plugin={name}={Path(sys.executable).parent / name}"


def _third_party_set(folder: Path) -> Path:
    """A descriptor set with every file that ours import but do not own, buf/validate included."""
    api = Path(next(iter(google.api.__path__))).parent.parent
    wellknown = Path(str(importlib.resources.files("grpc_tools") / "_proto"))
    whole = folder / "third_party.binpb"
    _protoc(
        "the third-party protos",
        f"-I{wellknown}",
        f"-I{api}",
        "--include_imports",
        f"--descriptor_set_out={whole}",
        *THIRD_PARTY,
    )
    files = descriptor_pb2.FileDescriptorSet.FromString(whole.read_bytes())
    files.file.append(descriptor_pb2.FileDescriptorProto.FromString(validate_pb._DESC.proto.to_binary()))
    whole.write_bytes(files.SerializeToString(deterministic=True))
    return whole


def _sources() -> list[str]:
    return sorted(path.relative_to(PROTO).as_posix() for path in (PROTO / OWN).rglob("*.proto"))


def descriptor_set() -> descriptor_pb2.FileDescriptorSet:
    """Our files, with their comments, and all that they import, without; imports before those who import them."""
    with tempfile.TemporaryDirectory() as scratch:
        third_party = _third_party_set(Path(scratch))
        out = Path(scratch) / "own.binpb"
        _protoc(
            "our protos",
            f"-I{PROTO}",
            f"--descriptor_set_in={third_party}",
            "--include_imports",
            "--include_source_info",
            f"--descriptor_set_out={out}",
            *_sources(),
        )
        files = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    for file in files.file:
        if not file.name.startswith(f"{OWN}/"):
            file.ClearField("source_code_info")
    return files


def write_image(target: Path) -> None:
    """Writes the descriptor set with imports marked as such, so that buf judges our own files alone."""
    files = descriptor_set()
    for file in files.file:
        if not file.name.startswith(f"{OWN}/"):
            file.MergeFromString(IS_IMPORT)
    target.write_bytes(files.SerializeToString(deterministic=True))


def generate(output: Path) -> None:
    """Makes `output` hold what these protos give and nothing else; untouched where protoc refuses them."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        _write_fresh(fresh)
        wanted = set(_generated_files(fresh))
        for stale in set(_generated_files(output)) - wanted:
            (output / stale).unlink()
        for path in wanted:
            (output / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fresh / path, output / path)


def _write_fresh(output: Path) -> None:
    """Writes messages, gRPC stubs, type stubs and the descriptor set of every proto here into an empty folder."""
    with tempfile.TemporaryDirectory() as scratch:
        third_party = _third_party_set(Path(scratch))
        # protoc wants our files from -I and the others from the set; buf/validate has messages alone.
        common = (f"-I{PROTO}", f"--descriptor_set_in={third_party}")
        messages = (_plugin("protoc-gen-mypy"), f"--python_out={output}", f"--mypy_out=quiet:{output}")
        services = (_plugin("protoc-gen-mypy_grpc"), f"--grpc_python_out={output}", f"--mypy_grpc_out=quiet:{output}")
        _protoc("our protos", *common, *messages, *services, *_sources())
        _protoc("buf/validate", *common, *messages, VALIDATE)
    _drop_empty_services(output)
    _mark_packages(output)
    descriptors = output / DESCRIPTORS
    descriptors.parent.mkdir(parents=True, exist_ok=True)
    descriptors.write_bytes(descriptor_set().SerializeToString(deterministic=True))


def _drop_empty_services(output: Path) -> None:
    """Removes the gRPC stubs of files that hold no service."""
    for stub in output.rglob("*_pb2_grpc.py"):
        if "add_" not in stub.read_text(encoding="utf-8"):
            stub.unlink()
            stub.with_suffix(".pyi").unlink(missing_ok=True)


def _mark_packages(output: Path) -> None:
    for folder in {path.parent for path in output.rglob("*_pb2.py")}:
        for package in [folder, *folder.parents]:
            if package == output:
                break
            (package / "__init__.py").touch()
            (package / "py.typed").touch()


def _generated_files(root: Path) -> Iterator[Path]:
    """What stands in the generated packages under `root`, relative to it."""
    for package in GENERATED_PACKAGES:
        for path in (root / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path.relative_to(root)


def drift(committed: Path) -> list[str]:
    """One line for each file under `committed` that is not what these protos give; empty where there is none."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        _write_fresh(fresh)
        wanted, there = set(_generated_files(fresh)), set(_generated_files(committed))
        lines = [f"missing: {path}" for path in sorted(wanted - there)]
        lines += [f"not generated from any proto: {path}" for path in sorted(there - wanted)]
        lines += [
            f"differs: {path}"
            for path in sorted(wanted & there)
            if (fresh / path).read_bytes() != (committed / path).read_bytes()
        ]
    return lines


def main() -> None:
    """Does what the command line asks; see the head of this file."""
    parser = argparse.ArgumentParser(description="Generate what is made from the protos.")
    parser.add_argument("folder", nargs="?", type=Path, default=STUBS, help="where the Python stubs go")
    parser.add_argument("--check", action="store_true", help="compare with what is committed, write nothing")
    parser.add_argument("--image", type=Path, metavar="FILE", help="write a buf image there, nothing else")
    options = parser.parse_args()
    if options.image:
        write_image(options.image)
    elif options.check:
        if lines := drift(options.folder):
            sys.stderr.write("\n".join(lines) + "\nGenerated code is out of date: run `make generate` and commit it.\n")
            raise SystemExit(1)
    else:
        options.folder.mkdir(parents=True, exist_ok=True)
        generate(options.folder)


if __name__ == "__main__":
    main()
