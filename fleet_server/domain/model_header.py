"""What the header of a safetensors file says of the model in it. Pure; agents judge files on their disks alike."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 16 << 20
"""Larger ones are listed without what they would say. (The format allows 100 MB, the largest in use have 3.)"""

_BY_TENSOR: tuple[tuple[str, str], ...] = (
    ("conditioner.embedders.1.", "sdxl"),
    ("lora_te2_", "sdxl"),
    ("model.diffusion_model.joint_blocks.", "sd3"),
    ("model.diffusion_model.double_blocks.", "flux"),
    ("double_blocks.", "flux"),
    ("cond_stage_model.model.", "sd2"),
    ("cond_stage_model.transformer.", "sd1"),
)
_BY_BASE: tuple[tuple[str, str], ...] = (("sdxl", "sdxl"), ("sd_v1", "sd1"), ("sd_v2", "sd2"), ("flux", "flux"))


class BadHeaderError(ValueError):
    """No safetensors file; the text says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class ModelHeader:
    """Base architecture ("" where it cannot be told), and the words that call a LoRA."""

    architecture: str = ""
    trigger_words: tuple[str, ...] = ()


def header_length(prefix: bytes, file_bytes: int) -> int:
    """How many bytes of JSON follow the first 8. Raises BadHeaderError."""
    if len(prefix) < LENGTH_BYTES:
        raise BadHeaderError("shorter than a safetensors header")
    length: int = struct.unpack_from("<Q", prefix)[0]
    if length > file_bytes - LENGTH_BYTES:
        raise BadHeaderError(f"claims a header of {length} bytes in a file of {file_bytes}")
    if length > MAX_HEADER_BYTES:
        raise BadHeaderError(f"its header has {length:,} bytes, more than {MAX_HEADER_BYTES:,}")
    return length


def read_header(raw: bytes, file_bytes: int) -> ModelHeader:
    """The header's JSON, without its first 8 bytes. Raises BadHeaderError."""
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadHeaderError(f"header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise BadHeaderError("header is not a JSON object")
    end = LENGTH_BYTES + len(raw) + max(map(_tensor_end, header.items()), default=0)
    if end > file_bytes:
        raise BadHeaderError(f"tensors end at byte {end} of a file of {file_bytes}: the file is cut short")
    meta = _metadata(header)
    return ModelHeader(_architecture(header, meta), _trigger_words(meta))


def _tensor_end(item: tuple[str, object]) -> int:
    name, entry = item
    if name == "__metadata__":
        return 0
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int and o >= 0 for o in offsets)):
        raise BadHeaderError(f"tensor {name!r} has no data_offsets")
    return int(offsets[1])


def _metadata(header: Mapping[str, object]) -> dict[str, str]:
    raw = header.get("__metadata__")
    return {k: v for k, v in raw.items() if isinstance(v, str)} if isinstance(raw, dict) else {}


def _architecture(header: Mapping[str, object], meta: Mapping[str, str]) -> str:
    named = meta.get("architecture") or meta.get("modelspec.architecture") or meta.get("ss_base_model_version")
    if named:
        return next((family for prefix, family in _BY_BASE if prefix in named.lower()), named[:64])
    return next((family for prefix, family in _BY_TENSOR if any(n.startswith(prefix) for n in header)), "")


def _trigger_words(meta: Mapping[str, str]) -> tuple[str, ...]:
    text = meta.get("trigger_words") or meta.get("modelspec.trigger_phrase") or ""
    words: Iterable[object] = text.split(",")
    if text.startswith("["):
        with contextlib.suppress(ValueError):
            words = json.loads(text)
    return tuple(word.strip() for word in words if isinstance(word, str) and word.strip())[:32]
