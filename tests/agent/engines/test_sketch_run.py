"""How a sketch task runs: progress, previews, cancellation, checked fields, and a file that says how it was made."""

from __future__ import annotations

import errno
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from fleet_agent.engines import png
from fleet_agent.engines.base import Cancelled, EngineError, ModelFile, Reason
from fleet_agent.engines.image import MAX_PREVIEW_BYTES, ImageRequest, preview_bytes
from fleet_agent.engines.sketch.painter import levels
from tests.agent.engines.helpers import Recorder, psnr, sketch, task_of


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 60])
def test_progress_counts_every_step_once(tmp_path: Path, steps: int) -> None:
    report = Recorder()
    sketch(tmp_path).run(task_of(tmp_path, steps=steps), report)
    assert report.steps == [(step, steps) for step in range(1, steps + 1)]


def test_the_last_step_is_reported_when_the_file_is_there(tmp_path: Path) -> None:
    class Checking(Recorder):
        def progress(self, step: int, steps: int, message: str | None = None) -> None:
            super().progress(step, steps, message)
            assert (tmp_path / "job-1.png").exists() == (step == steps)

    sketch(tmp_path).run(task_of(tmp_path), Checking())


def test_previews_gain_detail(tmp_path: Path) -> None:
    report = Recorder()
    result = sketch(tmp_path).run(task_of(tmp_path, width=512, height=384, steps=20, previews=True), report)
    final = np.asarray(Image.open(result.outputs[0].path))
    shown = [np.asarray(Image.open(io.BytesIO(data))) for _, data in report.previews]
    assert len(shown) >= 4
    assert {kind for kind, _ in report.previews} == {"image/jpeg"}
    assert all(len(data) <= MAX_PREVIEW_BYTES for _, data in report.previews)
    closeness = [psnr(preview, final) for preview in shown]
    assert closeness == sorted(closeness)
    assert closeness[-1] > closeness[0] + 3


def test_no_preview_unless_asked(tmp_path: Path) -> None:
    report = Recorder()
    sketch(tmp_path).run(task_of(tmp_path), report)
    assert report.previews == []


def test_a_noisy_preview_still_fits(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    assert 0 < len(preview_bytes(noise)) <= MAX_PREVIEW_BYTES


@pytest.mark.parametrize("after", [0, 1, 5, 7])
def test_cancel_between_steps_leaves_no_file(tmp_path: Path, after: int) -> None:
    report = Recorder(lambda done: done >= after)
    with pytest.raises(Cancelled):
        sketch(tmp_path).run(task_of(tmp_path), report)
    assert len(report.steps) == after
    assert not list(tmp_path.glob("*.png"))


def test_cancel_is_noticed_inside_a_step(tmp_path: Path) -> None:
    """A step of a large picture is long: it asks many times, not only at its ends."""
    report = Recorder()
    sketch(tmp_path).run(task_of(tmp_path, width=1024, height=1024, steps=4), report)
    assert report.checks > 60


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""),
        ("prompt", "  \n"),
        ("prompt", None),
        ("negative_prompt", 3),
        ("width", 65),
        ("width", 56),
        ("height", 2056),
        ("height", 64.0),
        ("width", True),
        ("steps", 0),
        ("steps", 151),
        ("guidance_scale", -0.1),
        ("guidance_scale", 50.1),
        ("guidance_scale", float("nan")),
        ("guidance_scale", "7"),
        ("scheduler", "nonesuch"),
        ("workflow", {"1": {}}),
    ],
)
def test_a_bad_field_is_named(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(EngineError, match=field) as caught:
        sketch(tmp_path).run(task_of(tmp_path, fields={field: value}), Recorder())
    assert caught.value.reason == Reason.INVALID_FIELD
    assert not caught.value.retryable


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_bad_seed_is_named(tmp_path: Path, seed: int) -> None:
    with pytest.raises(EngineError, match="seed"):
        sketch(tmp_path).run(task_of(tmp_path, seed=seed), Recorder())


def test_another_job_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="job_type"):
        sketch(tmp_path).run(task_of(tmp_path, job_type="video_gen"), Recorder())


def test_the_file_says_how_it_was_made(tmp_path: Path) -> None:
    prompt = "Berge über dem Meer 山"
    task = task_of(tmp_path, prompt=prompt, negative_prompt="", seed=2**63, guidance_scale=3.0)
    output = sketch(tmp_path).run(task, Recorder()).outputs[0]
    assert (output.content_type, output.width, output.height, output.seed) == ("image/png", 128, 128, 2**63)
    image = Image.open(output.path)
    assert isinstance(image, PngImagePlugin.PngImageFile)
    text = image.text
    assert text["parameters"].startswith(f"{prompt}\nNegative prompt: \nSteps: 8, ")
    expected = {
        "prompt": prompt,
        "negative_prompt": "",
        "seed": str(2**63),
        "model": "sketch",
        "steps": "8",
        "guidance_scale": "3",
        "loras": "",
        "engine": "sketch",
        "job_id": "job-1",
    }
    assert {key: text[key] for key in expected} == expected


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(png, "write", full)
    with pytest.raises(EngineError) as caught:
        sketch(tmp_path).run(task_of(tmp_path), Recorder())
    assert caught.value.reason == Reason.DISK_FULL


def test_an_unknown_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="other") as caught:
        sketch(tmp_path).run(task_of(tmp_path, model=ModelFile("other", None, "checkpoint")), Recorder())
    assert caught.value.reason == Reason.MODEL_NOT_FOUND


@pytest.mark.parametrize("scheduler", ["euler", "ddim", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 20, 150])
def test_the_canvas_only_grows_and_ends_whole(steps: int, scheduler: str) -> None:
    plan = levels(ImageRequest("x", "", 1024, 1024, steps, 7.5, 1, scheduler))
    assert len(plan) == steps
    assert plan == sorted(plan, reverse=True)
    assert plan[-1] == {1: 2, 2: 1, 3: 1}.get(steps, 0)


def test_a_tiny_picture_has_fewer_levels() -> None:
    assert set(levels(ImageRequest("x", "", 64, 64, 20, 7.5, 1, "euler"))) == {2, 1, 0}
