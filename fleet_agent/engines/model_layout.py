"""Checkpoints that are folders, as diffusers lays them out: a `model_index.json` and a folder for each part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

INDEX = "model_index.json"
_CHUNK = 1 << 20
_WEIGHTS = frozenset({".safetensors", ".json", ".txt", ".model"})
# What a pipeline's class tells of the family.
_BY_CLASS = (("StableDiffusionXL", "sdxl"), ("StableDiffusion3", "sd3"), ("Flux", "flux"), ("StableDiffusion", "sd1"))


def is_model(path: Path) -> bool:
    """Whether a folder is one checkpoint; one without weights is the layout of some file beside it."""
    return (path / INDEX).is_file() and next(path.glob("*/*.safetensors"), None) is not None


def architecture_of(path: Path) -> str | None:
    """The model family that the index names; None when unknown. Raises OSError, ValueError."""
    index = json.loads((path / INDEX).read_bytes())
    name = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(name, str):
        raise ValueError(f"{INDEX} names no pipeline")
    return next((family for prefix, family in _BY_CLASS if name.startswith(prefix)), None)


def state_of(path: Path) -> tuple[int, int]:
    """Bytes of all its files, and the time (ns) of the latest change. Raises OSError."""
    stats = [file.stat() for file in _files(path)]
    return sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)


def hash_of(path: Path, stop: Callable[[], bool]) -> str | None:
    """One hash over names and bytes of all files that matter, in hex; None where `stop` said so. Raises OSError."""
    digest = hashlib.sha256()
    for file in _files(path):
        name = file.relative_to(path).as_posix().encode()
        digest.update(len(name).to_bytes(4, "big") + name + file.stat().st_size.to_bytes(8, "big"))
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                if stop():
                    return None
                digest.update(chunk)
    return digest.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    for file in sorted(path.rglob("*")):
        if file.suffix in _WEIGHTS and file.is_file() and not file.name.startswith("."):
            yield file
