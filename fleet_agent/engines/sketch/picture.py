"""Puts the layers of a scene together, back to front, at one level of detail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from fleet_agent.engines.sketch import details
from fleet_agent.engines.sketch.city import Signs, Skyline
from fleet_agent.engines.sketch.dice import Array
from fleet_agent.engines.sketch.land import Copse, Forest, Hill, Knoll, Meadow, Mountain, Slope, hide_covered
from fleet_agent.engines.sketch.noise import line
from fleet_agent.engines.sketch.scene import Frame, Scene
from fleet_agent.engines.sketch.sky import Clouds, Sky, Stars
from fleet_agent.engines.sketch.water import Water


class Layer(Protocol):
    """Something painted band by band."""

    def paint(self, canvas: Array, rows: slice) -> None:
        """Paint its part of these rows of the canvas."""


def render(scene: Scene, frame: Frame, check: Callable[[], None]) -> Array:
    """Paint the scene, shape (3, height, width). `check` is called between bands and may raise to stop."""
    canvas = np.empty((3, frame.height, frame.width), np.float32)
    sky: list[Layer] = [Sky(scene, frame)]
    check()
    scene.soft()
    check()
    scene.rock()
    _run(canvas, frame, sky, check)
    if scene.has("stars"):
        Stars(scene, frame).paint_all(canvas)
    check()
    middle: list[Layer] = [Clouds(scene, frame)] if scene.has("clouds") else []
    check()
    middle += _distance(scene, frame, check)
    _run(canvas, frame, middle, check)
    if scene.mood == "cyber" and scene.has("city"):
        Signs(scene, frame).paint_all(canvas)
    if scene.has("castle"):
        details.castle(canvas, scene, frame, *_castle_place(scene))
    if scene.has("birds") and not scene.dark:
        details.birds(canvas, scene, frame)
    check()
    if scene.waterline is not None:
        _run(canvas, frame, [Water(scene, frame)], check)
        if scene.has("boat"):
            dice = scene.dice.child("boat")
            place = scene.waterline + dice.between(0.05, 0.12) * (scene.bottom - scene.waterline)
            details.boat(canvas, scene, frame, dice.between(0.2, 0.8) * scene.right, place)
    _foreground(canvas, scene, frame, check)
    return canvas


def _run(canvas: Array, frame: Frame, layers: Sequence[Layer], check: Callable[[], None]) -> None:
    for rows in frame.bands():
        check()
        for layer in layers:
            layer.paint(canvas, rows)


def _distance(scene: Scene, frame: Frame, check: Callable[[], None]) -> list[Layer]:
    """Everything that stands behind the waterline or the near ground."""
    layers: list[Layer] = []
    slopes: list[Slope] = []
    if scene.has("mountains"):
        count = 4
        slopes += [Mountain(scene, frame, index, count) for index in range(count)]
    elif scene.has("castle", "hills"):
        slopes += [Hill(scene, frame, i, 3, base=scene.horizon - 0.02 + 0.03 * i) for i in range(2)]
    elif scene.waterline is not None and scene.has("lake") and not scene.has("city"):
        slopes += [Hill(scene, frame, 0, 3, base=scene.horizon)]
    if scene.has("city"):
        slopes += [Skyline(scene, frame, index, 3) for index in range(3)]
    if scene.waterline is not None:
        end = frame.row(scene.waterline) + 1
        for slope in slopes:
            slope.hidden_below = min(slope.hidden_below, end)
    hide_covered(slopes)
    layers += slopes
    check()
    if scene.has("forest"):
        base = np.full_like(frame.xs, np.float32(scene.horizon + (0.004 if scene.waterline else 0.02)))
        base += (line(scene.dice.child("shore"), frame.xs, 2.0, 3) - np.float32(0.55)) * np.float32(0.04)
        if scene.waterline is not None:
            base = np.minimum(base, np.float32(scene.waterline + 0.004))
        layers.append(Forest(scene, frame, 0, base=base, height=0.075, nearness=0.30))
        check()
        layers.append(Forest(scene, frame, 1, base=base + np.float32(0.004), height=0.10, nearness=0.55))
    return layers


def _castle_place(scene: Scene) -> tuple[float, float]:
    side = 0.30 if scene.sun[0] > scene.right * 0.5 else 0.68
    return side * scene.right, scene.horizon - 0.015


def _foreground(canvas: Array, scene: Scene, frame: Frame, check: Callable[[], None]) -> None:
    layers: list[Layer] = []
    slopes: list[Slope] = []
    top = scene.horizon
    if scene.waterline is None:
        if scene.has("desert"):
            slopes += _rows_of_hills(scene, frame, 5, top + 0.01, scene.bottom - top)
        elif scene.has("meadow"):
            slopes.append(Meadow(scene, frame, top))
        elif scene.has("city"):
            slopes.append(Meadow(scene, frame, top + 0.004))
        else:
            slopes += _rows_of_hills(scene, frame, 4, top + 0.015, scene.bottom - top)
        hide_covered(slopes)
        layers += _with_trees(scene, frame, slopes, check)
    _run(canvas, frame, layers, check)
    if scene.has("meadow") and scene.waterline is None and not scene.has("snow"):
        details.flowers(canvas, scene, frame, top, check)
    place = (0.68 if scene.sun[0] < scene.right * 0.5 else 0.30) * scene.right
    stand = _near(canvas, scene, frame, place, check)
    check()
    if scene.has("cat"):
        details.cat(canvas, scene, frame, place, stand)
    if scene.has("figure"):
        details.wanderer(canvas, scene, frame, place + (0.15 if scene.has("cat") else 0.0), stand)
    check()
    if scene.has("rain") and scene.mood != "winter":
        details.rain(canvas, scene, frame, check)
    if scene.has("snowfall"):
        details.snowfall(canvas, scene, frame, check)


def _rows_of_hills(scene: Scene, frame: Frame, count: int, top: float, depth: float) -> list[Slope]:
    steps = [(i / max(1, count - 1)) ** 1.25 for i in range(count)]
    return [Hill(scene, frame, i, count, base=top + depth * 0.78 * step) for i, step in enumerate(steps)]


def _with_trees(scene: Scene, frame: Frame, slopes: Sequence[Slope], check: Callable[[], None]) -> list[Layer]:
    layers: list[Layer] = []
    for index, slope in enumerate(slopes):
        layers.append(slope)
        if isinstance(slope, Hill) and not slope.desert and index < len(slopes) - 1:
            check()
            layers.append(Copse(scene, frame, index, slope))
    return layers


def _near(canvas: Array, scene: Scene, frame: Frame, place: float, check: Callable[[], None]) -> float:
    """Paint what frames the view from below; return the height at which a figure can stand."""
    bottom = scene.bottom
    if scene.has("forest"):
        arc = (frame.xs * np.float32(2.0 / scene.right) - np.float32(1.0)) ** 2
        base = np.float32(bottom + 0.05) - arc * np.float32(0.10)
        if scene.waterline is None:
            mid = np.float32(scene.horizon + (bottom - scene.horizon) * 0.55) - arc * np.float32(0.05)
            _run(canvas, frame, [Forest(scene, frame, 2, base=mid, height=0.15, nearness=0.75)], check)
        _run(canvas, frame, [Forest(scene, frame, 3, base=base, height=0.20, nearness=1.0)], check)
    elif scene.has("meadow", "hills", "lake") and not scene.has("city", "desert", "snow"):
        details.grass(canvas, scene, frame, bottom, 0.085)
    if scene.has("cat", "figure"):
        _run(canvas, frame, [Knoll(scene, frame, place)], check)
    return bottom - 0.085
