"""What the sketch engine promises about pixels: equal for equal requests, and every field counts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from tests.agent.engines.helpers import luminance, mean_colour, paint


def test_same_request_same_pixels(tmp_path: Path) -> None:
    assert np.array_equal(paint(tmp_path), paint(tmp_path))


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 8},
        {"seed": 2**64 - 1},
        {"steps": 9},
        {"steps": 1},
        {"guidance_scale": 7.6},
        {"guidance_scale": 0},
        {"guidance_scale": 50.0},
        {"negative_prompt": ""},
        {"negative_prompt": "blurry, bad quality."},
        {"negative_prompt": "dark"},
        {"scheduler": "ddim"},
        {"scheduler": "dpmpp_2m"},
        {"prompt": "a beautiful sunset over mountains!"},
        {"prompt": "a beautiful sunset over mountains qwzx"},
    ],
    ids=str,
)
def test_every_field_changes_pixels(tmp_path: Path, changed: dict[str, object]) -> None:
    fields = dict(changed)
    seed = fields.pop("seed", 7)
    assert isinstance(seed, int)
    assert not np.array_equal(paint(tmp_path), paint(tmp_path, seed=seed, fields=fields))


WORDS = [
    "sunset",
    "mountains",
    "city",
    "cyberpunk",
    "night",
    "sea",
    "forest",
    "desert",
    "snow",
    "stars",
    "moon",
    "sun",
    "clouds",
    "rain",
    "flowers",
    "castle",
    "river",
    "portrait",
    "cat",
    "boat",
    "birds",
    "aurora",
    "galaxy",
    "mist",
    "hills",
    "dawn",
    "storm",
    "blue",
    "red",
]


def test_each_word_of_the_prompt_gives_another_picture(tmp_path: Path) -> None:
    seen = {hashlib.sha256(paint(tmp_path, prompt=f"a {word}").tobytes()).digest() for word in WORDS}
    assert len(seen) == len(WORDS)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("prompt", ["a beautiful sunset over mountains", "sunset", "sunset over the sea"])
def test_a_sunset_is_warm(tmp_path: Path, prompt: str, seed: int) -> None:
    red, _, blue = mean_colour(paint(tmp_path, prompt=prompt, seed=seed))
    assert red - blue >= 30


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("prompt", ["mountains at night", "cyberpunk city at night", "starry night over a lake"])
def test_a_night_is_dark(tmp_path: Path, prompt: str, seed: int) -> None:
    assert luminance(paint(tmp_path, prompt=prompt, seed=seed)) <= 80


def test_a_colour_word_colours(tmp_path: Path) -> None:
    red = mean_colour(paint(tmp_path, prompt="red hills in the afternoon"))
    blue = mean_colour(paint(tmp_path, prompt="blue hills in the afternoon"))
    assert red[0] - red[2] > blue[0] - blue[2] + 30


def test_negative_words_push_the_other_way(tmp_path: Path) -> None:
    plain = luminance(paint(tmp_path, negative_prompt="cartoon"))
    assert luminance(paint(tmp_path, negative_prompt="dark")) > plain + 2
    assert luminance(paint(tmp_path, negative_prompt="bright")) < plain - 2
    sharp = paint(tmp_path, negative_prompt="blurry", width=256, height=256).astype(int)
    soft = paint(tmp_path, negative_prompt="blorry", width=256, height=256).astype(int)
    assert np.abs(np.diff(sharp, axis=1)).mean() > np.abs(np.diff(soft, axis=1)).mean()


def test_an_unwanted_element_is_left_out(tmp_path: Path) -> None:
    """Without its moon and stars, a night sky over the sea has no bright pixel."""
    with_moon = paint(tmp_path, prompt="moon and stars over the sea at night")
    without = paint(tmp_path, prompt="moon and stars over the sea at night", negative_prompt="moon, stars, clouds")
    assert with_moon.max() > 200 > without.max()


def test_guidance_raises_contrast(tmp_path: Path) -> None:
    spread = [float(paint(tmp_path, guidance_scale=g).std()) for g in (0.0, 7.5, 20.0)]
    assert spread[0] < spread[1] < spread[2]


@pytest.mark.parametrize("size", [(64, 64), (64, 2048), (2048, 64), (72, 200), (1024, 576)])
def test_any_size(tmp_path: Path, size: tuple[int, int]) -> None:
    pixels = paint(tmp_path, prompt="city and forest by the sea, cat, boat, castle", width=size[0], height=size[1])
    assert pixels.shape == (size[1], size[0], 3)
    assert pixels.std() > 10


def test_a_known_request_gives_known_pixels(tmp_path: Path) -> None:
    """Coarse facts of one picture, so that a change of the painter is noticed: means of a 4 x 4 grid, within 1."""
    pixels = paint(tmp_path).astype(np.float64)
    blocks = pixels.reshape(4, 32, 4, 32, 3).mean(axis=(1, 3, 4)).round(1)
    assert np.abs(blocks - KNOWN).max() <= 1.0, blocks.tolist()


KNOWN = np.array(
    [[119.5, 135.1, 134.2, 114.5], [135.3, 117.6, 125.1, 129.9], [91.1, 85.4, 113.4, 99.4], [80.2, 86.4, 93.1, 68.4]]
)
