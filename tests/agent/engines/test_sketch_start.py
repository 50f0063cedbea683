"""Pictures to start from: size, strength and mask mean what they say, the same in gives the same out."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fleet_agent.engines import png
from fleet_agent.engines.base import EngineError, InputFile, Reason
from tests.agent.engines.helpers import Pixels, Recorder, paint, psnr, sketch, task_of

INIT, MASK = "job:parent", "output:mask.png"


def saved(path: Path, pixels: Pixels, kind: str = "PNG") -> InputFile:
    Image.fromarray(pixels).save(path, kind)
    return InputFile(path, f"image/{kind.lower()}")


def slope(width: int, height: int) -> Pixels:
    """A picture whose every pixel differs from its neighbours."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([across, down, 255 - across], axis=-1).astype(np.uint8)


def over(folder: Path, start: InputFile, mask: InputFile | None = None, **fields: Any) -> Pixels:
    """One run from a picture."""
    folder.mkdir(exist_ok=True)
    inputs = {INIT: (start,), **({MASK: (mask,)} if mask is not None else {})}
    names = {"init_image": INIT, **({"mask_image": MASK} if mask is not None else {})}
    result = sketch(folder).run(task_of(folder, fields={**names, **fields}, inputs=inputs), Recorder())
    return np.asarray(Image.open(result.outputs[0].path))


def test_strength_goes_from_the_picture_itself_to_a_new_one(tmp_path: Path) -> None:
    given = slope(128, 128)
    start = saved(tmp_path / "in.png", given)
    new = paint(tmp_path)
    assert np.array_equal(over(tmp_path, start, strength=0), given)
    assert np.array_equal(over(tmp_path, start, strength=1), new)
    near = [psnr(over(tmp_path, start, strength=strength), given) for strength in (0.1, 0.4, 0.75, 1)]
    assert near == sorted(near, reverse=True) and near[0] > near[-1] + 10
    assert np.array_equal(over(tmp_path, start), over(tmp_path, start, strength=0.75))


def test_the_same_picture_and_seed_give_the_same_pixels(tmp_path: Path) -> None:
    start = saved(tmp_path / "in.png", slope(96, 64))
    first = over(tmp_path / "a", start, width=192, height=128, strength=0.3)
    again = over(tmp_path / "b", start, width=192, height=128, strength=0.3)
    assert np.array_equal(first, again)


@pytest.mark.parametrize(("width", "height"), [(256, 192), (64, 64), (512, 128)])
def test_it_is_brought_to_the_size_asked_for(tmp_path: Path, width: int, height: int) -> None:
    start = saved(tmp_path / "in.png", slope(128, 96))
    picture = over(tmp_path, start, width=width, height=height, strength=0)
    assert picture.shape == (height, width, 3)
    assert psnr(picture, slope(width, height)) > 30


def test_only_what_is_white_in_the_mask_is_painted(tmp_path: Path) -> None:
    given = slope(128, 128)
    start = saved(tmp_path / "in.png", given)
    white = np.zeros((128, 128), np.uint8)
    white[:, 64:] = 255
    mask = saved(tmp_path / "mask.png", white)
    new = paint(tmp_path)
    picture = over(tmp_path, start, mask, strength=1)
    assert np.array_equal(picture[:, :64], given[:, :64])
    assert np.array_equal(picture[:, 64:], new[:, 64:])
    half = over(tmp_path, start, mask, strength=0.5)
    assert np.array_equal(half[:, :64], given[:, :64])
    assert not np.array_equal(half[:, 64:], new[:, 64:])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_usual_kinds_of_pictures_are_read(tmp_path: Path, kind: str) -> None:
    start = saved(tmp_path / "in", slope(128, 128), kind)
    assert psnr(over(tmp_path, start, strength=0), slope(128, 128)) > 25


def test_the_file_says_what_it_was_made_from(tmp_path: Path) -> None:
    start = saved(tmp_path / "in.png", slope(128, 128))
    over(tmp_path, start, strength=0.25)
    texts: dict[str, str] = dict(Image.open(tmp_path / "job-1.png").text)  # type: ignore[attr-defined]
    assert (texts["init_image"], texts["strength"]) == (INIT, "0.25")
    assert "Denoising strength: 0.25" in texts["parameters"]
    assert "mask_image" not in texts


def test_previews_show_what_comes_of_it(tmp_path: Path) -> None:
    given = slope(256, 256)
    report = Recorder()
    task = task_of(
        tmp_path, width=256, height=256, steps=20, previews=True,
        fields={"init_image": INIT, "strength": 0.1}, inputs={INIT: (saved(tmp_path / "in.png", given),)},
    )  # fmt: skip
    sketch(tmp_path).run(task, report)
    shown = [np.asarray(Image.open(io.BytesIO(data))) for _, data in report.previews]
    assert shown and all(psnr(preview, given) > 18 for preview in shown if preview.shape == given.shape)


def other(path: Path, data: bytes) -> InputFile:
    path.write_bytes(data)
    return InputFile(path, "image/png")


def bomb(path: Path) -> InputFile:
    """A small file of a huge picture."""
    tiny = png.encode(np.zeros((1, 1, 3), np.uint8))
    header = tiny[16:29].replace(b"\0\0\0\1\0\0\0\1", (9000).to_bytes(4, "big") * 2)
    return other(path, tiny[:16] + header + zlib.crc32(b"IHDR" + header).to_bytes(4, "big") + tiny[33:])


@pytest.mark.parametrize(
    ("make", "reason", "words"),
    [
        (lambda path: None, Reason.INPUT_NOT_FOUND, "init_image: there is no file behind"),
        (lambda path: InputFile(path / "gone.png", "image/png"), Reason.INPUT_NOT_FOUND, "gone from this node"),
        (lambda path: other(path, b"no picture"), Reason.INVALID_FIELD, "no PNG"),
        (bomb, Reason.INVALID_FIELD, "9000x9000"),
        (lambda path: saved(path, slope(8, 8), "GIF"), Reason.INVALID_FIELD, "no PNG"),
    ],
)
def test_a_picture_that_cannot_be_had_is_named(tmp_path: Path, make: Any, reason: Reason, words: str) -> None:
    file = make(tmp_path / "in")
    inputs = {} if file is None else {INIT: (file,)}
    with pytest.raises(EngineError, match=words) as caught:
        sketch(tmp_path).run(task_of(tmp_path, fields={"init_image": INIT}, inputs=inputs), Recorder())
    assert caught.value.reason == reason


@pytest.mark.parametrize("fields", [{"mask_image": MASK}, {"init_image": INIT, "strength": 1.1}])
def test_fields_that_do_not_fit_are_refused(tmp_path: Path, fields: dict[str, object]) -> None:
    file = saved(tmp_path / "in.png", slope(8, 8))
    with pytest.raises(EngineError, match=r"mask_image|strength") as caught:
        sketch(tmp_path).run(task_of(tmp_path, fields=fields, inputs={INIT: (file,), MASK: (file,)}), Recorder())
    assert caught.value.reason == Reason.INVALID_FIELD
