"""Paints a picture coarse to fine, in as many passes as there are steps.

Each step is one refinement pass over the whole canvas: at first on a small canvas with broad flat dabs, then on
ever larger ones, where the scene is rendered anew in more detail and finer strokes draw the canvas towards it.
What the strokes leave undone stays visible, so few steps give a loose sketch and many a finished picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fleet_agent.engines.image import ImageRequest
from fleet_agent.engines.sketch import finish
from fleet_agent.engines.sketch.dice import Array, Dice
from fleet_agent.engines.sketch.noise import resize
from fleet_agent.engines.sketch.picture import render
from fleet_agent.engines.sketch.scene import Frame, Scene, compose
from fleet_agent.engines.sketch.style import BRUSH, Style
from fleet_agent.engines.sketch.words import Reading, read

PREVIEW_SIDE = 512
# Share of the steps after which the canvas doubles, from the smallest (1/16 of the size) on.
_SCHEDULE = (0.10, 0.25, 0.45, 0.70)
SCHEDULERS: Mapping[str, Callable[[float], float]] = {
    "euler": lambda t: t,
    "ddim": lambda t: t * t,
    "dpmpp_2m": lambda t: t * (2.0 - t),
}


class Watcher(Protocol):
    """What the painter tells while it works; each may raise to stop it."""

    def check(self) -> None: ...

    def step(self, done: int, picture: Callable[[], npt.NDArray[np.uint8]] | None) -> None:
        """Called after a step; `picture` gives a small preview, None where the canvas gained too little."""


def levels(request: ImageRequest) -> list[int]:
    """Return, for each step, how often the canvas is halved: never rising, 0 is full size."""
    largest = max(0, min(4, int(math.log2(max(1, min(request.width, request.height) // 16)))))
    floor = {1: 2, 2: 1, 3: 1}.get(request.steps, 0)
    curve = SCHEDULERS[request.scheduler]
    plan = []
    for step in range(1, request.steps + 1):
        t = curve(step / request.steps)
        level = sum(t <= share for share in _SCHEDULE)
        plan.append(max(min(level, largest), min(floor, largest)))
    plan[-1] = min(floor, largest)
    return plan


def paint(request: ImageRequest, style: Style, watcher: Watcher) -> npt.NDArray[np.uint8]:
    """Return the picture, shape (height, width, 3)."""
    reading = read(request.prompt, request.negative_prompt)
    strength = _strength(request.guidance_scale)
    # Composition hangs on prompt and seed; fine texture also on all else, so that no field is without effect.
    dice = Dice("sketch", " ".join(reading.words), request.prompt.strip(), request.seed)
    texture = dice.child("texture", request.negative_prompt, request.steps, round(request.guidance_scale, 4))
    whole = Frame(request.width, request.height)
    scene = compose(reading, dice, style.palettes, style.gain, whole, strength)
    grade = finish.grade_of(style, reading, request.guidance_scale)
    plan = levels(request)
    canvas = _ground(scene, Frame(*_size(request, plan[0])), texture)
    target, level = canvas, -1
    for step, wanted in enumerate(plan):
        watcher.check()
        if wanted != level:
            level = wanted
            frame = Frame(*_size(request, level))
            target = render(scene, frame, watcher.check)
            watcher.check()
            canvas = resize(canvas, frame.height, frame.width, watcher.check)
        same = [i for i, other in enumerate(plan) if other == level]
        watcher.check()
        share = (step - same[0] + 1) / len(same)
        _stroke(canvas, target, style, texture.child("pass", step), share, reading, watcher.check)
        last = step == request.steps - 1
        worth = step == same[-1] and not last
        if not last:
            watcher.step(step + 1, _previewer(canvas, grade, whole) if worth else None)
    canvas = resize(canvas, request.height, request.width, watcher.check)
    picture = finish.finish(canvas, grade, texture, watcher.check)
    watcher.step(request.steps, lambda: finish.shrink(picture, PREVIEW_SIDE))
    return picture


def _strength(guidance: float) -> float:
    return min(2.0, guidance / 7.5)


def _size(request: ImageRequest, level: int) -> tuple[int, int]:
    return max(1, -(-request.width >> level)), max(1, -(-request.height >> level))


def _ground(scene: Scene, frame: Frame, dice: Dice) -> Array:
    """The bare canvas: a wash of the scene's haze with coarse noise, as a painter tones a board."""
    noise = dice.child("ground").floats(3, frame.height, frame.width)
    tone = scene.haze[:, None, None] * np.float32(0.6)
    return tone + noise * np.float32(0.30)


def _stroke(
    canvas: Array, target: Array, style: Style, dice: Dice, progress: float, reading: Reading, check: Callable[[], None]
) -> None:
    """Draw the canvas towards the target, with flat dabs early at a level and the target itself at its end."""
    _, height, width = canvas.shape
    cell = BRUSH
    across, down = width // cell + 2, height // cell + 2
    choice = np.floor(dice.floats(down, across) * np.float32(len(style.brushes) - 0.001)).astype(np.int32)
    ox, oy = dice.below(cell), dice.below(cell)
    lowest = 0.30 + 0.45 * progress + 0.08 * reading.refine
    span = (1.0 - lowest) * (1.15 - 0.4 * progress)
    brushes = style.brushes * np.float32(span) + np.float32(min(lowest, 0.95))
    for row in range(down):
        check()
        y0 = row * cell - oy
        rows = slice(max(0, y0), min(height, y0 + cell))
        if rows.start >= rows.stop:
            continue
        mask = brushes[choice[row], rows.start - y0 : rows.stop - y0]
        mask = mask.transpose(1, 0, 2).reshape(rows.stop - rows.start, across * cell)[:, ox : ox + width]
        aim = target[:, rows]
        if progress < 0.999:
            aim = _dabs(target, rows, progress)
        part = canvas[:, rows]
        part += (aim - part) * mask


def _dabs(target: Array, rows: slice, progress: float) -> Array:
    """The target seen through dabs 4 pixels wide, the more so the earlier the pass."""
    aim = target[:, rows]
    columns = np.minimum(np.arange(aim.shape[2]) // 4 * 4 + 2, aim.shape[2] - 1)
    near = aim[:, :, columns]
    near = near[:, np.minimum(np.arange(aim.shape[1]) // 4 * 4 + 2, aim.shape[1] - 1)]
    return near + (aim - near) * np.float32(progress)


def _previewer(canvas: Array, grade: finish.Grade, whole: Frame) -> Callable[[], npt.NDArray[np.uint8]]:
    scale = min(1.0, PREVIEW_SIDE / max(whole.width, whole.height))
    width, height = max(1, round(whole.width * scale)), max(1, round(whole.height * scale))
    return lambda: finish.quick(canvas, grade, height, width)
