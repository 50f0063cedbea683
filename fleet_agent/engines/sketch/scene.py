"""From words to a composition: what is in the picture and where, drawn from the prompt's own dice.

Positions are in units of the shorter side, so that a sun is round and a mountain keeps its shape in any format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fleet_agent.engines.sketch.dice import Array, Dice
from fleet_agent.engines.sketch.noise import tile
from fleet_agent.engines.sketch.palettes import GROUND, LIGHT, SKY, luminance, mix
from fleet_agent.engines.sketch.words import MOODS, Mood, Reading

BAND_ROWS = 64
_SCENERY = ("mountains", "hills", "city", "sea", "lake", "forest", "desert", "meadow", "castle")
_ARCHETYPES = (
    {"mountains", "lake", "forest"}, {"hills", "meadow", "clouds"}, {"sea", "clouds", "birds"}, {"desert"},
    {"mountains", "forest", "mist"}, {"city"}, {"hills", "castle", "clouds"}, {"sea", "boat", "mountains"},
)  # fmt: skip


@dataclass(frozen=True)
class Frame:
    """A raster of the picture at one level of detail."""

    width: int
    height: int

    @property
    def pixels(self) -> int:
        """Pixels per unit of length."""
        return min(self.width, self.height)

    @property
    def right(self) -> float:
        return self.width / self.pixels

    @property
    def bottom(self) -> float:
        return self.height / self.pixels

    @cached_property
    def xs(self) -> Array:
        """x of each column's centre, shape (1, width)."""
        return ((np.arange(self.width, dtype=np.float32) + np.float32(0.5)) / np.float32(self.pixels))[None, :]

    @cached_property
    def ys(self) -> Array:
        """y of each row's centre, shape (height, 1); downwards."""
        return ((np.arange(self.height, dtype=np.float32) + np.float32(0.5)) / np.float32(self.pixels))[:, None]

    def row(self, y: float) -> int:
        """Return the first row at or below y, held inside the frame."""
        return max(0, min(self.height, int(y * self.pixels)))

    def bands(self, top: int = 0, bottom: int | None = None) -> Iterator[slice]:
        """Yield runs of rows small enough to stay in the processor's cache."""
        end = self.height if bottom is None else min(bottom, self.height)
        for start in range(max(top, 0), end, BAND_ROWS):
            yield slice(start, min(start + BAND_ROWS, end))


@dataclass(frozen=True)
class Scene:
    """A composition. Every draw comes from `dice` by name, so that it is the same at every level of detail."""

    mood: Mood
    elements: frozenset[str]
    palette: Array
    dice: Dice
    gain: float
    right: float
    bottom: float
    horizon: float
    waterline: float | None
    sun: tuple[float, float]
    sun_radius: float
    accents: tuple[tuple[float, float, float], ...] = ()
    tiles: dict[str, Array] = field(default_factory=dict)

    def has(self, *names: str) -> bool:
        return any(name in self.elements for name in names)

    @property
    def dark(self) -> bool:
        return self.mood in ("night", "cyber")

    def colour(self, index: int) -> Array:
        """Return one palette colour, shape (3,)."""
        return np.ascontiguousarray(self.palette[index])

    @property
    def sky(self) -> Array:
        return self.palette[SKY]

    @property
    def haze(self) -> Array:
        """The colour that distance takes on: the sky just above the horizon."""
        return mix(self.palette[4], self.palette[3], 0.45)

    def soft(self) -> Array:
        """Cloud-like noise, repeating with period 1."""
        return self._tile("soft", 4, ridged=False)

    def rock(self) -> Array:
        """Noise with sharp crests, repeating with period 1."""
        return self._tile("rock", 6, ridged=True)

    def _tile(self, name: str, first: int, *, ridged: bool) -> Array:
        if name not in self.tiles:
            self.tiles[name] = tile(self.dice.child("tile", name), first, 6, self.gain, ridged=ridged)
        return self.tiles[name]


def compose(reading: Reading, dice: Dice, palettes: Array, gain: float, frame: Frame, strength: float = 1.0) -> Scene:
    """Decide the scene. `strength` (from the guidance scale) is how far named colours reach, about 0..2."""
    plan = dice.child("plan")
    mood, elements = _choose(reading, plan)
    palette = _tinted(reading, palettes[MOODS.index(mood)], mood, strength)
    horizon = plan.between(0.55, 0.64)
    if elements & {"meadow", "desert"}:
        horizon = plan.between(0.50, 0.58)
    if "city" in elements:
        horizon = plan.between(0.66, 0.72)
    if elements & {"sea"} and not elements & {"mountains", "city"}:
        horizon = plan.between(0.52, 0.60)
    wet = bool(elements & {"sea", "lake"})
    side = plan.between(0.24, 0.42) if plan.chance(0.5) else plan.between(0.58, 0.76)
    height = {"sunset": 0.80, "dawn": 0.72, "dusk": 0.78, "day": 0.28, "winter": 0.40, "storm": 0.5}.get(mood, 0.34)
    height += plan.between(-0.06, 0.06)
    radius = {"sunset": 0.055, "dawn": 0.045, "cyber": 0.13, "day": 0.035}.get(mood, 0.05)
    if mood == "cyber":
        height = 0.55
    return Scene(
        mood, frozenset(elements), palette, dice, gain, frame.right, frame.bottom,
        horizon=horizon * frame.bottom,
        waterline=horizon * frame.bottom if wet else None,
        sun=(side * frame.right, height * horizon * frame.bottom),
        sun_radius=radius * plan.between(0.85, 1.15),
        accents=reading.colours,
    )  # fmt: skip


def _choose(reading: Reading, plan: Dice) -> tuple[Mood, set[str]]:
    elements = set(reading.elements)
    mood = reading.mood or _any_mood(reading, plan)
    if not elements & set(_SCENERY):
        elements |= plan.pick(_ARCHETYPES)
    cloudy = 1.0 if mood == "storm" else 0.3 if mood in ("night", "cyber") else 0.9
    extras: list[tuple[str, float]] = [("clouds", cloudy), ("birds", 0.3)]
    if mood in ("day", "sunset", "dawn", "dusk"):
        extras.append(("sun", 1.0))
    if mood == "night":
        extras += [("stars", 1.0), ("moon", 0.0 if elements & {"aurora", "galaxy"} else 0.8)]
    if mood == "cyber":
        extras += [("stars", 0.6), ("sun", 1.0)]
    if mood == "dusk":
        extras.append(("stars", 0.8))
    if mood == "winter":
        extras += [("snow", 1.0), ("snowfall", 0.5), ("forest", 0.5)]
    if "mountains" in elements and not elements & {"sea", "lake", "city", "desert", "meadow"}:
        extras += [("lake", 0.5), ("forest", 0.85), ("mist", 0.5)]
    if "city" in elements:
        extras.append(("lake", 1.0))
    if "hills" in elements and not elements & {"city", "desert", "sea", "castle"}:
        extras.append(("mountains", 0.75))
    if elements & {"meadow", "castle"} and "mountains" not in elements:
        extras += [("hills", 1.0), ("mountains", 0.55)]
    if "forest" in elements and "hills" not in elements:
        extras += [("mountains", 0.6), ("mist", 0.7)]
    for name, probability in extras:
        if plan.chance(probability) and name not in reading.unwanted:
            elements.add(name)
    return mood, elements - set(reading.unwanted)


def _any_mood(reading: Reading, plan: Dice) -> Mood:
    free: tuple[Mood, ...] = ("day", "dawn", "sunset", "dusk")
    return plan.pick([mood for mood in free if mood not in reading.unwanted] or list(free))


def _tinted(reading: Reading, base: Array, mood: Mood, strength: float) -> Array:
    """Let the colours that were named reach into the palette, keeping each colour's lightness."""
    palette = base.copy()
    reach = min(0.85, 0.5 * strength)
    for index, colour in enumerate(reading.colours):
        target = np.array(colour, np.float32)
        places = (1, 2, 3, 4, 6, 8, 10) if index == 0 else (0, 1, 7, LIGHT, 9) if index == 1 else (4, 6, GROUND)
        for place in places:
            lightness = luminance(palette[place])
            scaled = target * np.float32(lightness / max(luminance(target), 0.02))
            palette[place] = mix(palette[place], np.clip(scaled, 0.0, 1.0), reach)
    for colour in reading.unwanted_colours:
        target = np.array(colour, np.float32)
        grey = np.float32(sum(colour) / 3.0)
        palette = np.clip(palette - (target - grey) * np.float32(0.30 * strength) * palette, 0.0, 1.0)
    lift = 0.16 * reading.lighten
    if lift > 0:
        palette = palette + (1.0 - palette) * np.float32(lift)
    elif lift < 0:
        palette = palette * np.float32(1.0 + lift)
    return palette.astype(np.float32)
