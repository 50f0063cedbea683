"""The files of a node: what was uploaded, what its graphs saved, and pictures to save."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

Key = tuple[str, str, str]
"""type, subfolder, filename."""


@dataclass
class Files:
    """Files by type, subfolder and name."""

    data: dict[Key, bytes] = field(default_factory=dict)

    def upload(self, kind: str, subfolder: str, name: str, data: bytes, overwrite: bool) -> str:
        """Keeps an upload; its name, which is another where a different file has it."""
        stem, dot, ending = name.rpartition(".")
        taken, count = name, 0
        while not overwrite and self.data.get((kind, subfolder, taken), data) != data:
            count += 1
            taken = f"{stem} ({count}){dot}{ending}" if dot else f"{name} ({count})"
        self.data[kind, subfolder, taken] = data
        return taken

    def save(self, kind: str, prefix: str, ending: str, data: bytes) -> dict[str, str]:
        """Keeps an output under the next free number, as a SaveImage node does."""
        subfolder, _, name = prefix.rpartition("/")
        number = 1
        while (kind, subfolder, filename := f"{name}_{number:05}_.{ending}") in self.data:
            number += 1
        self.data[kind, subfolder, filename] = data
        return {"filename": filename, "subfolder": subfolder, "type": kind}

    def input_named(self, name: str) -> Key:
        """The key of an input as a graph names it: `sub/in.png`, `in.png [output]`."""
        kind = "input"
        for word in ("input", "output", "temp"):
            if name.endswith(f" [{word}]"):
                kind, name = word, name.removesuffix(f" [{word}]")
        subfolder, _, filename = name.rpartition("/")
        return kind, subfolder, filename

    def stamp(self, name: str) -> str:
        """What changes when a file changes."""
        return hashlib.sha256(self.data.get(self.input_named(name), b"")).hexdigest()


def png(width: int, height: int, seed: int, prompt: Any, extra: dict[str, Any]) -> bytes:
    """A picture as SaveImage writes it, its graph in text chunks."""
    info = PngInfo()
    info.add_text("prompt", json.dumps(prompt))
    for name, value in (extra.get("extra_pnginfo") or {}).items():
        info.add_text(name, json.dumps(value))
    out = io.BytesIO()
    Image.new("RGB", (width, height), _color(seed)).save(out, "PNG", pnginfo=info, compress_level=1)
    return out.getvalue()


def animation(width: int, height: int, seed: int, frames: int, fps: float) -> bytes:
    """An animated WebP."""
    pictures = [Image.new("RGB", (width, height), _color(seed + number)) for number in range(frames)]
    out = io.BytesIO()
    pictures[0].save(out, "WEBP", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), method=0)
    return out.getvalue()


def preview(step: int) -> bytes:
    """A small JPEG, another at each step."""
    out = io.BytesIO()
    Image.new("RGB", (64, 64), _color(step)).save(out, "JPEG")
    return out.getvalue()


def preview_frame(image: bytes) -> bytes:
    """Binary event 1: a JPEG."""
    return struct.pack(">II", 1, 1) + image


def preview_with_metadata_frame(image: bytes, node_id: str, prompt_id: str) -> bytes:
    """Binary event 4: the same with its node and prompt."""
    head = json.dumps(
        {
            "node_id": node_id,
            "prompt_id": prompt_id,
            "display_node_id": node_id,
            "parent_node_id": None,
            "real_node_id": node_id,
            "image_type": "image/jpeg",
        }
    ).encode()
    return struct.pack(">II", 4, len(head)) + head + image


def _color(seed: int) -> tuple[int, int, int]:
    digest = hashlib.sha256(str(seed).encode()).digest()
    return digest[0], digest[1], digest[2]
