"""A prompt in, a picture out."""

from __future__ import annotations

from pathlib import Path

from fleet_client import FleetCommander
from PIL import Image


def test_connect(fleet: FleetCommander) -> None:
    """`connect` says whether the server is there and takes your key."""
    assert fleet.connect()["status"] == "connected"


def test_generate_a_picture(fleet: FleetCommander, tmp_path: Path) -> None:
    """`generate_image` waits for the picture and gives it as a PIL image."""
    picture = fleet.generate_image("a beautiful sunset over mountains", width=512, height=256)
    assert picture.size == (512, 256)
    picture.save(tmp_path / "sunset.png")


def test_the_same_seed_gives_the_same_pixels(fleet: FleetCommander) -> None:
    """A picture is decided by its request and its seed, on whatever node and whenever it is made."""
    first = fleet.generate_image("a forest", seed=7, width=256, height=256)
    again = fleet.generate_image("a forest", seed=7, width=256, height=256)
    other = fleet.generate_image("a forest", seed=8, width=256, height=256)
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_a_drawn_seed_is_told(fleet: FleetCommander) -> None:
    """Without a seed one is drawn; `info` has it, so that the picture can be made again."""
    picture = fleet.generate_image("a city at night", width=128, height=128)
    again = fleet.generate_image("a city at night", width=128, height=128, seed=picture.info["seed"])
    assert picture.tobytes() == again.tobytes()


def test_the_picture_knows_how_it_was_made(fleet: FleetCommander) -> None:
    """Prompt and seed stand in the PNG itself."""
    picture = fleet.generate_image("a lighthouse", seed=11, width=128, height=128)
    file = fleet.get_output(picture.info["filename"])
    assert b"a lighthouse" in file
    assert picture.info["prompt"] == "a lighthouse"
    assert picture.info["seed"] == 11


def test_the_gallery(fleet: FleetCommander) -> None:
    """Every picture is kept, and found by the words of its prompt; newest first."""
    fleet.generate_image("a turquoise submarine", width=128, height=128, steps=4)
    image = fleet.get_gallery(prompt="submarine turquoise")["images"][0]
    assert (image["width"], image["height"]) == (128, 128)
    assert image["metadata"]["prompt"] == "a turquoise submarine"
    assert image["metadata"]["steps"] == 4
    assert fleet.get_output_metadata(image["filename"]) == image


def test_thumbnails(fleet: FleetCommander, tmp_path: Path) -> None:
    """`width` gives a small WebP of a picture."""
    filename = fleet.generate_image("a meadow", width=256, height=128).info["filename"]
    (tmp_path / "small.webp").write_bytes(fleet.get_output(filename, width=64))
    with Image.open(tmp_path / "small.webp") as small:
        assert (small.format, small.size) == ("WEBP", (64, 32))


def test_a_picture_can_be_removed(fleet: FleetCommander) -> None:
    """`delete_output` removes a picture everywhere."""
    filename = fleet.generate_image("a mistake", width=64, height=64).info["filename"]
    assert fleet.delete_output(filename)["filename"] == filename
    assert filename not in [image["filename"] for image in fleet.get_gallery()["images"]]
