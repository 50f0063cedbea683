"""Checkpoints and LoRAs of the sketch engine: real files that decide pixels, load, and leave without a trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fleet_agent.engines.base import EngineError, LoraUse, ModelFile, Reason
from fleet_agent.engines.models import ModelFolder
from fleet_agent.engines.sketch_model import CHECKPOINTS, LORAS, main, make_checkpoint, make_lora, parse_size
from tests.agent.engines.helpers import paint, sketch, task_of


def _folder(root: Path) -> dict[str, ModelFile]:
    for style in CHECKPOINTS:
        make_checkpoint(root / "models/checkpoints" / f"{style}.safetensors", style)
    for style in LORAS:
        make_lora(root / "models/loras" / f"{style}.safetensors", style)
    return {file.name.removesuffix(".safetensors"): file for file in ModelFolder(root / "models").scan().files}


def test_each_checkpoint_and_lora_changes_pixels(tmp_path: Path) -> None:
    files = _folder(tmp_path)
    assert files.keys() == CHECKPOINTS.keys() | LORAS.keys()
    pictures = [paint(tmp_path, model=files[style]) for style in CHECKPOINTS]
    pictures += [paint(tmp_path, loras=(LoraUse(files[style], 1.0),)) for style in LORAS]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_the_classic_checkpoint_is_the_built_in_model(tmp_path: Path) -> None:
    assert np.array_equal(paint(tmp_path, model=_folder(tmp_path)["classic"]), paint(tmp_path))


def test_weights_count_and_weight_zero_is_none(tmp_path: Path) -> None:
    ink = _folder(tmp_path)["ink"]
    plain = paint(tmp_path)
    assert np.array_equal(paint(tmp_path, loras=(LoraUse(ink, 0.0),)), plain)
    pictures = [paint(tmp_path, loras=(LoraUse(ink, weight),)) for weight in (-2.0, -1.0, 0.3, 1.0, 2.0)]
    assert len({picture.tobytes() for picture in [plain, *pictures]}) == 6


def test_a_lora_leaves_no_trace_in_the_engine(tmp_path: Path) -> None:
    files = _folder(tmp_path)
    engine = sketch(tmp_path)
    before = paint(tmp_path, engine=engine)
    both = (LoraUse(files["ink"], 1.3), LoraUse(files["neon"], -0.7))
    mixed = paint(tmp_path, engine=engine, loras=both)
    assert not np.array_equal(mixed, before)
    assert engine.loaded()[0].loras == ("ink.safetensors", "neon.safetensors")
    assert np.array_equal(paint(tmp_path, engine=engine), before)
    assert engine.loaded()[0].loras == ()
    assert np.array_equal(paint(tmp_path, engine=engine, loras=both[::-1]), mixed)


def test_load_costs_what_the_file_holds_and_unload_frees_it(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "models/checkpoints/big.safetensors", "noir", 3, 3_000_000)
    assert abs(path.stat().st_size - 3_000_000) < 4096
    file = ModelFolder(tmp_path / "models").scan().files[0]
    engine = sketch(tmp_path)
    loaded = engine.load(file)
    assert loaded.memory_bytes > 2_990_000 and loaded.load_seconds > 0
    assert engine.load(file) == loaded
    assert engine.loaded() == [loaded]
    engine.unload("another")
    assert engine.loaded() == [loaded]
    engine.unload("big.safetensors")
    assert engine.loaded() == []


def test_another_model_takes_the_place_of_the_first(tmp_path: Path) -> None:
    files = _folder(tmp_path)
    engine = sketch(tmp_path)
    engine.load(files["noir"])
    engine.load(files["ember"])
    assert [model.name for model in engine.loaded()] == ["ember.safetensors"]


def test_the_same_style_and_seed_give_equal_bytes(tmp_path: Path) -> None:
    a, b, c = (
        make_checkpoint(tmp_path / f"{name}.safetensors", "pastel", seed, 200_000).read_bytes()
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert a == b != c


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    engine = sketch(tmp_path)
    cases = {
        Reason.MODEL_NOT_FOUND: ModelFile("gone.safetensors", tmp_path / "gone.safetensors", "checkpoint"),
        Reason.LORA_NOT_FOUND: ModelFile("lost.safetensors", tmp_path / "lost.safetensors", "lora"),
    }
    for reason, file in cases.items():
        with pytest.raises(EngineError, match=file.name) as caught:
            engine.load(file) if file.kind == "checkpoint" else engine.load(None, (LoraUse(file),))
        assert caught.value.reason == reason
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"not a model at all")
    other = tmp_path / "other.safetensors"
    save_file({"weights": np.zeros((2, 2), np.float32)}, other)
    for path in (junk, other):
        for kind in ("checkpoint", "lora"):
            file = ModelFile(path.name, path, "lora" if kind == "lora" else "checkpoint")
            with pytest.raises(EngineError, match=path.name) as caught:
                engine.load(file) if kind == "checkpoint" else engine.load(None, (LoraUse(file),))
            assert caught.value.reason == Reason.ENGINE_FAILED


def test_the_command_writes_into_a_model_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--style", "ember", "--size", "1MB"]) == 0
    assert main(["--out", str(tmp_path), "--lora", "--style", "neon", "--name", "glow.safetensors"]) == 0
    assert "not a diffusion model" in capsys.readouterr().out
    checkpoint, lora = ModelFolder(tmp_path).scan().files
    assert (checkpoint.name, checkpoint.kind, checkpoint.architecture) == (
        "sketch-ember.safetensors",
        "checkpoint",
        "sketch",
    )
    assert abs(checkpoint.size_bytes - 1_000_000) < 4096
    assert (lora.name, lora.kind, lora.trigger_words) == ("glow.safetensors", "lora", ("neon", "neon style"))
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    "argv", [["--style", "nonesuch"], ["--name", "../x.safetensors"], ["--size", "12 parsecs"], ["--size", "10"]]
)
def test_the_command_refuses(tmp_path: Path, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--out", str(tmp_path), *argv])
    assert caught.value.code == 2
    assert argv[0].removeprefix("--") in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_sizes() -> None:
    assert [parse_size(text) for text in ("4096", "64MB", "1.5 GiB", "2kb")] == [4096, 64_000_000, 1_610_612_736, 2000]


def test_estimate_grows_with_the_picture(tmp_path: Path) -> None:
    engine = sketch(tmp_path)
    small = engine.estimate(task_of(tmp_path))
    assert small < engine.estimate(task_of(tmp_path, width=2048, height=2048))
