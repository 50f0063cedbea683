"""Model files for tests: real safetensors of any size, made quickly."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any


def header_of(size: int = 0, metadata: dict[str, str] | None = None, tensors: dict[str, Any] | None = None) -> bytes:
    """The head of a file whose one tensor has `size` bytes."""
    fields: dict[str, Any] = {"__metadata__": metadata} if metadata is not None else {}
    fields |= (
        tensors if tensors is not None else {"filler": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    )
    raw = json.dumps(fields).encode()
    return struct.pack("<Q", len(raw)) + raw


def model_bytes(size: int, *, architecture: str = "sketch", seed: int = 0, **metadata: str) -> bytes:
    """A file with about `size` bytes of noise, which its header names."""
    noise = random.Random(seed).randbytes(size)
    return header_of(size, {"architecture": architecture, **metadata}) + noise


def put(path: Path, data: bytes) -> Path:
    """Writes it, folders and all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
