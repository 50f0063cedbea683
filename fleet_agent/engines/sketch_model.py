"""Makes checkpoints and LoRAs for the sketch engine: palettes and brushes, not a diffusion model.

They are real `.safetensors` files that load, move and differ like any other, so that downloads, model affinity and
eviction can be had without a GPU. `size_bytes` pads a file with tensors that the engine must read but not use.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fleet_agent.engines.sketch.dice import Array, Dice
from fleet_agent.engines.sketch.engine import ARCHITECTURE
from fleet_agent.engines.sketch.noise import blur
from fleet_agent.engines.sketch.palettes import GROUND, LIGHT, NEAR
from fleet_agent.engines.sketch.style import EFFECTS, SHAPES, brush_set, default_tensors

MAX_SIZE_BYTES = 64 << 30
_NOTE = "palettes and brushes for the sketch engine; not a diffusion model"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_PAD_BYTES = 1 << 20
_HEADER_BYTES = 2048


def _effects(**values: float) -> Array:
    return np.array([values.get(name, 0.0) for name in EFFECTS], np.float32)


def _pull(palettes: Array, colour: tuple[float, float, float], amount: float) -> Array:
    """Draw every colour towards one hue, keeping its lightness."""
    weights = np.array([0.299, 0.587, 0.114], np.float32)
    hue = np.array(colour, np.float32)
    light = (palettes * weights).sum(axis=-1, keepdims=True)
    target = np.clip(hue * light / max(1e-3, float((hue * weights).sum())), 0.0, 1.0)
    pulled: Array = palettes + (target - palettes) * np.float32(amount)
    return pulled


def _classic(t: dict[str, Array], dice: Dice) -> None:
    """The built-in look."""


def _pastel(t: dict[str, Array], dice: Dice) -> None:
    t["palettes"] = t["palettes"] * np.float32(0.72) + np.float32(0.26)
    t["effects"] += _effects(contrast=-0.5, saturation=-0.1, glow=0.15, paper=0.25)
    t["spectrum"][:] = 0.45


def _noir(t: dict[str, Array], dice: Dice) -> None:
    t["palettes"] = _pull(t["palettes"], (0.80, 0.84, 1.0), 0.88)
    t["effects"] += _effects(contrast=0.9, texture=0.9, outline=0.1)


def _ember(t: dict[str, Array], dice: Dice) -> None:
    t["palettes"] = _pull(t["palettes"], (1.0, 0.52, 0.26), 0.42)
    t["effects"] += _effects(warmth=0.6, glow=0.35, saturation=0.15)
    t["spectrum"][:] = 0.58


def _print(t: dict[str, Array], dice: Dice) -> None:
    t["effects"] += _effects(flatten=0.85, outline=0.45, paper=0.5, glow=-0.35, contrast=0.2)
    t["spectrum"][:] = 0.42


CHECKPOINTS: Mapping[str, Callable[[dict[str, Array], Dice], None]] = {
    "classic": _classic, "pastel": _pastel, "noir": _noir, "ember": _ember, "print": _print,
}  # fmt: skip


def _ink(base: Array) -> tuple[Array, Array]:
    return _pull(base, (0.92, 0.90, 0.84), 0.55) - base, _effects(outline=1.0, paper=0.6, glow=-0.3, contrast=0.4)


def _neon(base: Array) -> tuple[Array, Array]:
    shift = _pull(base, (0.55, 0.20, 1.0), 0.40) - base
    shift[:, LIGHT] = np.array([1.0, 0.35, 0.85], np.float32) - base[:, LIGHT]
    shift[:, (NEAR, GROUND)] -= np.float32(0.06)
    return shift, _effects(glow=0.9, saturation=0.7, contrast=0.5)


def _watercolor(base: Array) -> tuple[Array, Array]:
    return (base * np.float32(0.78) + np.float32(0.22)) - base, _effects(
        paper=1.0, outline=0.25, glow=-0.2, contrast=-0.3, flatten=0.15
    )


def _autumn(base: Array) -> tuple[Array, Array]:
    shift = np.zeros_like(base)
    for place, colour in ((NEAR, (0.52, 0.24, 0.10)), (GROUND, (0.62, 0.34, 0.10))):
        shift[:, place] = (np.array(colour, np.float32) - base[:, place]) * np.float32(0.7)
    return shift, _effects(warmth=0.7, saturation=0.2)


LORAS: Mapping[str, Callable[[Array], tuple[Array, Array]]] = {
    "ink": _ink, "neon": _neon, "watercolor": _watercolor, "autumn": _autumn,
}  # fmt: skip


def make_checkpoint(path: Path, style: str = "classic", seed: int = 0, size_bytes: int | None = None) -> Path:
    """Write a checkpoint. Another seed gives other brushes and slightly other colours; the same gives equal bytes.

    Raises ValueError for an unknown style or a size that the file cannot have.
    """
    if style not in CHECKPOINTS:
        raise ValueError(f"style: unknown checkpoint style {style!r}; one of {', '.join(CHECKPOINTS)}")
    dice = Dice("checkpoint", style, seed)
    tensors = default_tensors()
    CHECKPOINTS[style](tensors, dice)
    if seed:
        drift = dice.child("drift").floats(*SHAPES["palettes"]) - np.float32(0.5)
        tensors["palettes"] = tensors["palettes"] + drift * np.float32(0.05)
        tensors["brushes"] = brush_set(dice, dice.between(1.0, 5.0))
    tensors["palettes"] = np.clip(tensors["palettes"], 0.0, 1.0).astype(np.float32)
    metadata = {"architecture": ARCHITECTURE, "title": f"sketch {style}", "style": style, "description": _NOTE}
    return _save(path, tensors, metadata, dice, size_bytes)


def make_lora(path: Path, style: str, size_bytes: int | None = None) -> Path:
    """Write a LoRA of one style, with its trigger word. Raises ValueError as `make_checkpoint` does."""
    if style not in LORAS:
        raise ValueError(f"style: unknown LoRA style {style!r}; one of {', '.join(LORAS)}")
    dice = Dice("lora", style)
    base = default_tensors()
    palettes, effects = LORAS[style](base["palettes"])
    brushes = blur(brush_set(dice, 4.0), 1) - base["brushes"]
    tensors = {
        "lora.palettes": palettes.astype(np.float32),
        "lora.effects": effects,
        "lora.brushes": (brushes * np.float32(0.6)).astype(np.float32),
    }
    metadata = {"architecture": ARCHITECTURE, "title": f"sketch LoRA {style}", "style": style, "description": _NOTE}
    metadata["trigger_words"] = json.dumps([style, f"{style} style"])
    return _save(path, tensors, metadata, dice, size_bytes)


def _save(
    path: Path, tensors: Mapping[str, Array], metadata: dict[str, str], dice: Dice, size_bytes: int | None
) -> Path:
    """Write a safetensors file, keys sorted: equal content gives equal bytes, so equal hashes on every node.

    Padding is noise, so that no transfer or disk can compress it away, and is streamed, so that it needs no memory.
    """
    own = sum(tensor.nbytes for tensor in tensors.values())
    padding = 0 if size_bytes is None else size_bytes - own - _HEADER_BYTES
    if padding < 0 or (size_bytes or 0) > MAX_SIZE_BYTES:
        least = own + _HEADER_BYTES
        raise ValueError(f"size: must be {least} to {MAX_SIZE_BYTES} bytes, got {size_bytes}")
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, tensor in sorted(tensors.items()):
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    if padding:
        header["padding"] = {"dtype": "U8", "shape": [padding], "data_offsets": [end, end + padding]}
    text = json.dumps(header, sort_keys=True).encode().ljust(_HEADER_BYTES - 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    with temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in sorted(tensors.items()):
            file.write(np.ascontiguousarray(tensor, "<f4").tobytes())
        block = np.floor(dice.child("padding").floats(_PAD_BYTES) * np.float32(256.0)).astype(np.uint8)
        for start in range(0, padding, _PAD_BYTES):
            # Each block differs from the last, so that none can be stored once for all.
            file.write((block[: min(_PAD_BYTES, padding - start)] + np.uint8(start // _PAD_BYTES % 256)).tobytes())
    temporary.replace(path)
    return path


def parse_size(text: str) -> int:
    """Return the bytes of "64MB", "1.5GiB" or "4096". Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise ValueError(f"size: cannot read {text!r}; write it as 64MB or 1GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def main(argv: Sequence[str] | None = None) -> int:
    """The command `fleet sketch-model`: writes one file into the model folder given by --out."""
    parser = argparse.ArgumentParser("fleet sketch-model", description=f"Make {_NOTE}.")
    parser.add_argument("--out", type=Path, required=True, help="model folder; checkpoints/ or loras/ is made below it")
    parser.add_argument("--style", default=None, help=f"checkpoint: {', '.join(CHECKPOINTS)}; LoRA: {', '.join(LORAS)}")
    parser.add_argument("--lora", action="store_true", help="make a LoRA instead of a checkpoint")
    parser.add_argument("--name", default=None, help="file name (default: from the style)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other brushes (checkpoints)")
    parser.add_argument("--size", default=None, help="pad the file to this size, e.g. 64MB")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    style = options.style or ("ink" if options.lora else "classic")
    name = options.name or (f"{style}.safetensors" if options.lora else f"sketch-{style}.safetensors")
    if not name.endswith(".safetensors") or "/" in name or name.startswith("."):
        parser.error("--name: must be a plain file name that ends in .safetensors")
    try:
        size = parse_size(options.size) if options.size else None
        if options.lora:
            path = make_lora(options.out / "loras" / name, style, size)
        else:
            path = make_checkpoint(options.out / "checkpoints" / name, style, options.seed, size)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    size_bytes = path.stat().st_size
    if options.json:
        kind = "lora" if options.lora else "checkpoint"
        made = {"path": str(path), "name": name, "kind": kind, "style": style, "size_bytes": size_bytes, "note": _NOTE}
        sys.stdout.write(f"{json.dumps(made)}\n")
    else:
        sys.stdout.write(f"{path} ({size_bytes} bytes): {_NOTE}\n")
    return 0
