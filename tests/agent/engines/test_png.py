"""The PNG writer: any reader gets back the same pixels and the same texts."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from fleet_agent.engines import png


def _open(data: bytes) -> PngImagePlugin.PngImageFile:
    image = Image.open(io.BytesIO(data))
    assert isinstance(image, PngImagePlugin.PngImageFile)
    image.load()
    return image


def _noise(height: int, width: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (63, 5), (64, 64), (65, 3), (200, 120)])
def test_pixels_come_back_equal(size: tuple[int, int]) -> None:
    pixels = _noise(*size)
    assert np.array_equal(np.asarray(_open(png.encode(pixels))), pixels)


def test_pixels_that_are_a_view_come_back_equal() -> None:
    pixels = _noise(60, 80).transpose(1, 0, 2)[::2]
    assert np.array_equal(np.asarray(_open(png.encode(pixels))), pixels)


def test_texts_come_back_in_any_script() -> None:
    texts = {
        "prompt": "ein Sonnenuntergang über Bergen, 山の夕焼け 🌄",
        "plain": "ascii, with\nlines",
        "latin": "café",
        "empty": "",
    }
    assert _open(png.encode(_noise(8, 8), texts)).text == texts


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"), max_size=200))
def test_every_text_comes_back(text: str) -> None:
    assert _open(png.encode(_noise(2, 2), {"prompt": text})).text == {"prompt": text}


def test_what_no_chunk_can_hold_is_replaced_not_fatal() -> None:
    text = _open(png.encode(_noise(2, 2), {"prompt": "a\x00b\ud800c"})).text["prompt"]
    assert text == "a\ufffdb?c"


@pytest.mark.parametrize("keyword", ["", "x" * 80, "new\nline", " padded"])
def test_a_bad_keyword_is_refused(keyword: str) -> None:
    with pytest.raises(ValueError):
        png.encode(_noise(2, 2), {keyword: "text"})


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        png.encode(np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match="shape"):
        png.encode(np.zeros((0, 4, 3), np.uint8))


def test_smooth_pictures_are_compressed(tmp_path: Path) -> None:
    rows = np.repeat(np.arange(128, dtype=np.uint8)[:, None, None], 128, axis=1).repeat(3, axis=2)
    size = png.write(tmp_path / "a.png", rows)
    assert size == (tmp_path / "a.png").stat().st_size < rows.nbytes // 20
