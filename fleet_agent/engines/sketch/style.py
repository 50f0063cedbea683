"""What a sketch checkpoint decides, and how LoRAs shift it.

A checkpoint holds four tensors: `palettes` (moods, 12, 3), `brushes` (n, 16, 16), `spectrum` (1,) the gain of the
noise's octaves, and `effects` (one number per name in EFFECTS). A LoRA holds differences of the same shapes under
`lora.<name>`. A style is computed anew from the untouched checkpoint for every task, so a LoRA leaves no trace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fleet_agent.engines.base import EngineError
from fleet_agent.engines.sketch.dice import Array, Dice
from fleet_agent.engines.sketch.noise import blur
from fleet_agent.engines.sketch.palettes import COLOURS_PER_MOOD, built_in
from fleet_agent.engines.sketch.words import MOODS

EFFECTS = ("contrast", "saturation", "warmth", "glow", "outline", "paper", "texture", "flatten")
BRUSH = 16
BRUSHES = 24
_DEFAULT_EFFECTS = (0.0, 0.0, 0.0, 0.55, 0.0, 0.0, 0.35, 0.0)
SHAPES: Mapping[str, tuple[int, ...]] = {
    "palettes": (len(MOODS), COLOURS_PER_MOOD, 3),
    "brushes": (BRUSHES, BRUSH, BRUSH),
    "spectrum": (1,),
    "effects": (len(EFFECTS),),
}
Tensors = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Style:
    """The look of one task: a checkpoint with its LoRAs applied."""

    palettes: Array
    brushes: Array
    gain: float
    effects: Mapping[str, float]


def brush_set(dice: Dice, stretch: float = 2.4) -> Array:
    """Return brush masks, each with mean about 0.5: bristle marks at several angles."""
    masks = []
    for index in range(BRUSHES):
        field = dice.child("brush", index).floats(1, BRUSH * 2, BRUSH * 2)
        turn = index % 4
        for _ in range(max(1, int(stretch))):
            shifts = ((0, 1), (1, 1), (1, 0), (1, -1))[turn]
            field = field + np.roll(field, shifts, (1, 2)) + np.roll(field, (-shifts[0], -shifts[1]), (1, 2))
            field *= np.float32(1.0 / 3.0)
        mask = blur(field, 1)[0, BRUSH // 2 : -BRUSH // 2, BRUSH // 2 : -BRUSH // 2]
        low, high = mask.min(), mask.max()
        masks.append((mask - low) / max(np.float32(1e-6), high - low))
    return np.stack(masks).astype(np.float32)


def default_tensors() -> dict[str, Array]:
    """Return the built-in checkpoint's tensors."""
    return {
        "palettes": built_in(),
        "brushes": brush_set(Dice("brushes")),
        "spectrum": np.array([0.52], np.float32),
        "effects": np.array(_DEFAULT_EFFECTS, np.float32),
    }


def checked(tensors: Tensors, source: str, *, prefix: str = "") -> dict[str, Array]:
    """Return the style tensors of a file, checked; raises EngineError naming the file and the tensor."""
    found: dict[str, Array] = {}
    for name, shape in SHAPES.items():
        tensor = tensors.get(prefix + name)
        if tensor is None and prefix:
            tensor = np.zeros(shape, np.float32)
        if tensor is None or tensor.shape != shape or tensor.dtype != np.float32 or not np.isfinite(tensor).all():
            raise EngineError(
                "ENGINE_FAILED",
                f"{source} is no sketch model: tensor {prefix + name} must be finite float32 of shape {list(shape)}; "
                "make one with `fleet sketch-model`",
            )
        found[name] = tensor
    return found


def combine(checkpoint: Tensors, loras: Sequence[tuple[Tensors, float]]) -> Style:
    """Return the checkpoint with each LoRA's difference added, times its weight; weight 0 adds nothing at all."""
    total = {name: np.array(checkpoint[name], np.float32) for name in SHAPES}
    for tensors, weight in loras:
        if weight != 0.0:
            for name in SHAPES:
                total[name] = total[name] + tensors[name] * np.float32(weight)
    effects = np.clip(total["effects"], -2.0, 3.0)
    return Style(
        palettes=np.clip(total["palettes"], 0.0, 1.0),
        brushes=np.clip(total["brushes"], 0.0, 1.0),
        gain=min(0.8, max(0.25, float(total["spectrum"][0]))),
        effects={name: float(effects[index]) for index, name in enumerate(EFFECTS)},
    )
