"""Reads a prompt: which mood, elements and colours its words name, and what a negative prompt takes away."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

Mood = Literal["day", "sunset", "dawn", "night", "cyber", "storm", "winter", "dusk"]
MOODS: tuple[Mood, ...] = get_args(Mood)
_MOOD_NAMES: frozenset[str] = frozenset(MOODS)

_MOOD_WORDS: dict[Mood, str] = {
    "cyber": "cyberpunk neon synthwave vaporwave futuristic scifi blade retrowave hologram",
    "night": "night midnight nighttime moon moonlit moonlight moonrise stars starry stargazing galaxy milky nebula "
    "space cosmos aurora nocturnal constellation",
    "sunset": "sunset sundown golden evening afterglow",
    "dawn": "dawn sunrise morning daybreak misty mist pastel",
    "dusk": "dusk twilight gloaming purple violet dreamy fantasy magic magical enchanted",
    "storm": "storm stormy rain rainy thunder thunderstorm tempest gloomy overcast grey gray moody downpour",
    "winter": "winter snow snowy snowfall ice icy arctic frozen frost blizzard glacier polar",
    "day": "day noon daylight sunny summer spring bright midday blue afternoon",
}
# In this order a mood wins over a later one that the prompt names as well ("cyberpunk city at night").
_MOOD_ORDER: tuple[Mood, ...] = ("cyber", "night", "sunset", "dawn", "storm", "dusk", "winter", "day")

_ELEMENT_WORDS: dict[str, str] = {
    "mountains": "mountain mountains mountainous peak peaks alps alpine summit himalaya rocky cliffs volcano canyon "
    "fjord glacier",
    "hills": "hill hills valley countryside rolling farmland vineyard tuscany landscape",
    "city": "city cities skyline town metropolis urban downtown skyscraper skyscrapers buildings street tokyo york "
    "london manhattan cyberpunk futuristic",
    "sea": "sea ocean beach coast coastal waves wave shore seaside harbor harbour bay surf tropical island",
    "lake": "lake river water pond reflection reflections lagoon fjord stream mirror",
    "forest": "forest forests wood woods woodland tree trees pine pines jungle fir spruce conifer grove",
    "desert": "desert dune dunes sand sandy sahara oasis mars",
    "meadow": "meadow field fields flower flowers grass garden wildflowers poppies lavender tulips sunflowers prairie "
    "blossom roses spring",
    "snow": "snow snowy snowfall winter blizzard ice icy arctic frozen",
    "snowfall": "snowfall snowing blizzard snowflakes snowstorm",
    "rain": "rain rainy raining storm thunderstorm downpour drizzle",
    "stars": "stars star starry stargazing galaxy milky nebula space cosmos constellation night midnight",
    "galaxy": "galaxy milky nebula space cosmos universe",
    "aurora": "aurora borealis northern",
    "moon": "moon moonlit moonlight moonrise lunar crescent",
    "sun": "sun sunny sunset sunrise sundown sunlight sunbeam solar",
    "clouds": "cloud clouds cloudy overcast sky storm dramatic cumulus",
    "mist": "mist misty fog foggy haze hazy",
    "castle": "castle fortress palace citadel tower towers kingdom medieval fairytale",
    "boat": "boat boats ship ships sail sailing sailboat yacht fishing",
    "birds": "bird birds seagull seagulls crow crows flock geese",
    "cat": "cat cats kitten kitty feline",
    "figure": "person people man woman girl boy portrait traveler traveller wanderer hiker wizard hero human "
    "samurai knight astronaut lonely",
}

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.16, 0.14), "crimson": (0.78, 0.08, 0.20), "scarlet": (0.92, 0.18, 0.08),
    "orange": (0.98, 0.52, 0.12), "amber": (0.98, 0.68, 0.18), "golden": (0.96, 0.74, 0.26),
    "gold": (0.96, 0.74, 0.26), "yellow": (0.98, 0.86, 0.24), "green": (0.24, 0.66, 0.30),
    "emerald": (0.10, 0.60, 0.42), "teal": (0.08, 0.56, 0.58), "turquoise": (0.18, 0.76, 0.74),
    "cyan": (0.16, 0.80, 0.92), "blue": (0.16, 0.36, 0.88), "azure": (0.24, 0.56, 0.96),
    "indigo": (0.28, 0.16, 0.62), "purple": (0.52, 0.22, 0.72), "violet": (0.58, 0.30, 0.86),
    "lavender": (0.72, 0.62, 0.92), "magenta": (0.90, 0.16, 0.66), "pink": (0.98, 0.56, 0.72),
    "rose": (0.92, 0.42, 0.54), "brown": (0.46, 0.30, 0.18), "white": (0.96, 0.96, 0.96),
    "black": (0.05, 0.05, 0.06), "silver": (0.74, 0.77, 0.80), "grey": (0.52, 0.54, 0.56),
    "gray": (0.52, 0.54, 0.56),
}  # fmt: skip


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SOFT = _set("blurry blur blurred soft unsharp fuzzy hazy")
_DARK = _set("dark darkness gloomy dim underexposed")
_BRIGHT = _set("bright overexposed glare washed")
_DULL = _set("dull desaturated monochrome grayscale flat boring pale")
_LOUD = _set("saturated oversaturated garish vivid colorful colourful")
_NOISY = _set("noisy noise grain grainy artifacts jpeg")
_POOR = _set("bad low worst poor ugly quality lowres")


@dataclass(frozen=True, slots=True)
class Reading:
    """What a pair of prompts asks for. Strengths are 0..1."""

    mood: Mood | None
    elements: frozenset[str]
    colours: tuple[tuple[float, float, float], ...]
    words: tuple[str, ...]
    unwanted: frozenset[str]
    unwanted_colours: tuple[tuple[float, float, float], ...]
    sharpen: float
    lighten: float
    saturate: float
    clean: float
    refine: float


def split(text: str) -> tuple[str, ...]:
    """Return the words of a text in lower case, in order; letters and digits of any script."""
    return tuple(re.findall(r"[^\W_]+", text.lower()))


def _named(words: frozenset[str]) -> frozenset[str]:
    return frozenset(name for name, known in _ELEMENT_WORDS.items() if words & _set(known))


def _mood(words: frozenset[str], unwanted: frozenset[str]) -> Mood | None:
    for mood in _MOOD_ORDER:
        if words & _set(_MOOD_WORDS[mood]) and mood not in unwanted:
            return mood
    return None


def _level(words: frozenset[str], known: frozenset[str]) -> float:
    return min(1.0, 0.7 * len(words & known))


def read(prompt: str, negative_prompt: str) -> Reading:
    """Read both prompts. Words that name nothing are kept in `words`: they steer the composition's seed."""
    words = split(prompt)
    wanted, not_wanted = frozenset(words), frozenset(split(negative_prompt))
    unwanted = _named(not_wanted) | (not_wanted & _MOOD_NAMES)
    colours = tuple(COLOURS[w] for w in dict.fromkeys(words) if w in COLOURS and w not in not_wanted)
    return Reading(
        mood=_mood(wanted, unwanted),
        elements=_named(wanted) - unwanted,
        colours=colours[:3],
        words=words,
        unwanted=unwanted,
        unwanted_colours=tuple(COLOURS[w] for w in sorted(not_wanted & COLOURS.keys())),
        sharpen=_level(not_wanted, _SOFT),
        lighten=_level(not_wanted, _DARK) - _level(not_wanted, _BRIGHT),
        saturate=_level(not_wanted, _DULL) - _level(not_wanted, _LOUD),
        clean=_level(not_wanted, _NOISY),
        refine=_level(not_wanted, _POOR),
    )
