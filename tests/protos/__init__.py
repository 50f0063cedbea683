"""Protos of the tests' own, compiled when they are first asked for, so that no generated code is kept."""

from __future__ import annotations

import functools
import importlib.resources
import importlib.util
import tempfile
from pathlib import Path
from types import ModuleType

import google.api
from grpc_tools import protoc

_HERE = Path(__file__).resolve().parent
_PROTO = _HERE.parents[1] / "proto"


@functools.cache
def load(name: str) -> ModuleType:
    """The messages of `tests/protos/<name>.proto`, in the default pool, as its generated module."""
    own_api = Path(next(iter(google.api.__path__))).parent.parent
    includes = [_HERE, _PROTO, Path(str(importlib.resources.files("grpc_tools") / "_proto")), own_api]
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["protoc", *(f"-I{path}" for path in includes), f"--python_out={folder}", f"{name}.proto"]
        if protoc.main(arguments):
            raise RuntimeError(f"protoc refused tests/protos/{name}.proto")
        spec = importlib.util.spec_from_file_location(f"{__name__}.{name}_pb2", Path(folder) / f"{name}_pb2.py")
        if spec is None or spec.loader is None:
            raise RuntimeError(f"protoc wrote no module for {name}.proto")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module
