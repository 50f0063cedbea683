"""Painting over a picture that is there: it is brought to the size asked for, and the new one is laid over it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from fleet_agent.engines.base import EngineError, InputFile, Task

MAX_PIXELS = 64_000_000
_FORMATS = ("PNG", "JPEG", "WEBP")
DEFAULT_STRENGTH = 0.75
_ROWS = 64

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Start:
    """The picture to begin with at the size of the task, and how much of the new one shows: a number, or one a pixel.

    `strength` 0 leaves the picture as it is, 1 leaves nothing of it.
    """

    picture: Pixels
    strength: float
    mask: npt.NDArray[np.float32] | None


def start_of(task: Task, width: int, height: int) -> Start | None:
    """Reads init_image and mask_image; None where the task has none. Raises EngineError naming the field."""
    fields = task.fields
    init, mask = _file(task, "init_image"), _file(task, "mask_image")
    if init is None:
        if mask is not None:
            raise EngineError("INVALID_FIELD", "mask_image: needs init_image: give both, or leave it out")
        return None
    strength = _strength(fields)
    picture = np.asarray(_opened(init, "init_image", "RGB").resize((width, height), Image.Resampling.LANCZOS))
    shares = None
    if mask is not None:
        white = _opened(mask, "mask_image", "L").resize((width, height), Image.Resampling.BILINEAR)
        shares = np.asarray(white, np.float32) / np.float32(255)
    return Start(picture, strength, shares)


def lay_over(start: Start, painted: Pixels) -> Pixels:
    """The painted picture over the one to begin with, by strength and mask; the same in gives the same out."""
    out = np.empty_like(painted)
    for top in range(0, painted.shape[0], _ROWS):
        rows = slice(top, top + _ROWS)
        below = start.picture[rows].astype(np.float32)
        share: np.float32 | npt.NDArray[np.float32] = np.float32(start.strength)
        if start.mask is not None:
            share = start.mask[rows, :, None] * np.float32(start.strength)
        below += (painted[rows].astype(np.float32) - below) * share
        out[rows] = np.rint(below).astype(np.uint8)
    return out


def resized(start: Start, width: int, height: int) -> Start:
    """The same at another size, for previews."""
    picture = np.asarray(Image.fromarray(start.picture).resize((width, height), Image.Resampling.BILINEAR))
    mask = start.mask
    if mask is not None:
        mask = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.BILINEAR))
    return Start(picture, start.strength, mask)


def _file(task: Task, name: str) -> InputFile | None:
    reference = task.fields.get(name)
    if reference in (None, ""):
        return None
    files = task.inputs.get(str(reference), ())
    if not files:
        raise EngineError("INPUT_NOT_FOUND", f"{name}: there is no file behind {reference}")
    return files[0]


def _strength(fields: Mapping[str, object]) -> float:
    strength = fields.get("strength", DEFAULT_STRENGTH)
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1:
        raise EngineError("INVALID_FIELD", f"strength: must be a number from 0 to 1, got {strength!r}")
    return float(strength)


def _opened(file: InputFile, name: str, mode: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # What Pillow warns of as a bomb is beyond our own limit anyway.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file.path, formats=_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise EngineError(
                        "INVALID_FIELD", f"{name}: has {image.width}x{image.height} pixels; at most 64 million are read"
                    )
                return image.convert(mode)
    except FileNotFoundError as error:
        raise EngineError("INPUT_NOT_FOUND", f"{name}: its file is gone from this node", retryable=True) from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise EngineError("INVALID_FIELD", f"{name}: is no PNG, JPEG or WebP picture that can be read") from error
