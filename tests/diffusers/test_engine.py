"""The diffusers engine with a real, tiny SDXL on the processor: pictures, batches, LoRAs, memory, cancellation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from fleet_agent.engines.base import Cancelled, EngineError, EngineResult, EngineSettings, LoraUse, ModelFile, Task
from fleet_agent.engines.diffusers import denoise
from fleet_agent.engines.diffusers.engine import DiffusersEngine
from fleet_agent.engines.diffusers.options import Options
from fleet_agent.engines.diffusers.vae import encoded
from fleet_agent.engines.start import Start, start_of
from tests.agent.engines.helpers import Recorder
from tests.diffusers import micro

# What diffusers and torch do with each other and with NumPy is theirs.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]

Pixels = npt.NDArray[np.int16]
FIELDS: dict[str, object] = {"prompt": "a sunset", "negative_prompt": "blurry", "width": 64, "height": 64, "steps": 3}
PROMPTS = ("a sunset over the sea", "a city at night", "mountains", "a red boat")


def checkpoint(models: Path, name: str = micro.MODEL, sha256: str = "a") -> ModelFile:
    return ModelFile(name, models / "checkpoints" / name, "checkpoint", 4_000_000, sha256, "sdxl")


def lora(models: Path, weight: float = 1.0) -> tuple[LoraUse, ...]:
    return (LoraUse(ModelFile(micro.LORA, models / "loras" / micro.LORA, "lora", 100_000, "c"), weight),)


@pytest.fixture(scope="module")
def shared(models: Path, tmp_path_factory: pytest.TempPathFactory) -> DiffusersEngine:
    """One engine for tests that leave no trace in it."""
    return make(models, tmp_path_factory.mktemp("data"))


def make(models: Path, data: Path, **options: Any) -> DiffusersEngine:
    return DiffusersEngine(EngineSettings(models, data), Options(device="cpu", **options))


def task(folder: Path, model: ModelFile, seed: int = 1, loras: tuple[LoraUse, ...] = (), **fields: Any) -> Task:
    folder = folder / f"{seed}"
    folder.mkdir(exist_ok=True)
    return Task(f"job-{seed}", "image_gen", model, loras, {**FIELDS, **fields}, seed, folder, previews=True)


def pixels(result: EngineResult) -> Pixels:
    with Image.open(result.outputs[0].path) as image:
        return np.asarray(image).astype(np.int16)


def paint(engine: DiffusersEngine, one: Task) -> Pixels:
    engine.load(one.model, one.loras)
    return pixels(engine.run(one, Recorder()))


def apart(left: Pixels, right: Pixels) -> int:
    return int(np.abs(left - right).max())


def test_the_same_seed_gives_the_same_picture_and_every_field_another(
    shared: DiffusersEngine, models: Path, tmp_path: Path
) -> None:
    model = checkpoint(models)
    first = paint(shared, task(tmp_path, model))
    assert apart(first, paint(shared, task(tmp_path, model))) == 0
    for fields in ({"prompt": "a city"}, {"negative_prompt": ""}, {"steps": 4}, {"guidance_scale": 2.0}):
        assert apart(first, paint(shared, task(tmp_path, model, **fields))) > 8, fields
    assert apart(first, paint(shared, task(tmp_path, model, seed=2**64 - 1))) > 8


def test_a_batch_of_four_is_the_four_pictures_one_by_one(shared: DiffusersEngine, models: Path, tmp_path: Path) -> None:
    """In float32 within 2 of 255 a channel; seeds, prompts and guidance never mixed."""
    model = checkpoint(models)
    tasks = [
        task(tmp_path, model, seed=index + 1, prompt=prompt, guidance_scale=5.0 + index)
        for index, prompt in enumerate(PROMPTS)
    ]
    alone = [paint(shared, one) for one in tasks]
    together = batch(shared, tasks)
    for index in range(4):
        assert apart(alone[index], pixels(together[index])) <= 2
        assert all(apart(alone[index], alone[other]) > 8 for other in range(4) if other != index)


def batch(engine: DiffusersEngine, tasks: list[Task], reports: list[Recorder] | None = None) -> list[Any]:
    engine.load(tasks[0].model, tasks[0].loras)
    ended: dict[int, Any] = {}
    for place, how in engine.run_batch(tasks, reports or [Recorder() for _ in tasks]):
        assert place not in ended
        ended[place] = how
    return [ended[place] for place in range(len(tasks))]


def test_prompts_of_other_lengths_do_not_touch_each_other(
    shared: DiffusersEngine, models: Path, tmp_path: Path
) -> None:
    """A prompt of several chunks shares no loop with a short one, or the short one would be padded."""
    model, long = checkpoint(models), "tower " * 60
    tasks = [task(tmp_path, model, seed=1), task(tmp_path, model, seed=2, prompt=long)]
    alone = [paint(shared, one) for one in tasks]
    for index, result in enumerate(batch(shared, tasks)):
        assert apart(alone[index], pixels(result)) <= 2


def test_words_beyond_77_tokens_count(shared: DiffusersEngine, models: Path, tmp_path: Path) -> None:
    model, long = checkpoint(models), "tower " * 60
    first = paint(shared, task(tmp_path, model, prompt=long + "red"))
    assert apart(first, paint(shared, task(tmp_path, model, prompt=long + "blue"))) > 0


def test_one_file_is_the_same_model(shared: DiffusersEngine, models: Path, tmp_path: Path) -> None:
    """But for float16, in which the file is."""
    folder = paint(shared, task(tmp_path, checkpoint(models)))
    assert apart(folder, paint(shared, task(tmp_path, checkpoint(models, micro.ONE_FILE, "b")))) <= 4


def test_a_lora_is_put_on_and_taken_off_exactly(models: Path, tmp_path: Path) -> None:
    engine, model = make(models, tmp_path), checkpoint(models)
    without = paint(engine, task(tmp_path, model))
    with_lora = paint(engine, task(tmp_path, model, loras=lora(models)))
    assert apart(without, with_lora) > 8
    assert engine.loaded()[0].loras == (micro.LORA,)
    half = paint(engine, task(tmp_path, model, loras=lora(models, 0.5)))
    assert apart(half, with_lora) > 8 and apart(half, without) > 8
    assert apart(without, paint(engine, task(tmp_path, model, loras=lora(models, 0)))) == 0
    assert apart(with_lora, paint(engine, task(tmp_path, model, loras=lora(models)))) == 0
    assert apart(without, paint(engine, task(tmp_path, model))) == 0
    assert engine.loaded()[0].loras == ()


def test_a_small_budget_keeps_what_was_used_last(models: Path, tmp_path: Path) -> None:
    """Room for one model on the device and one beside it: the older one moves off, and the oldest goes."""
    one = make(models, tmp_path).load(checkpoint(models)).memory_bytes
    engine = make(models, tmp_path, memory_bytes=one * 3 // 2, host_memory_bytes=one * 3 // 2)
    first, second = checkpoint(models), checkpoint(models, micro.ONE_FILE, "b")
    engine.load(first)
    engine.load(second)
    assert [model.name for model in engine.loaded()] == [second.name]
    engine.load(first)
    assert [model.name for model in engine.loaded()] == [first.name]
    engine.unload(first.name)
    assert engine.loaded() == []


def test_a_file_of_the_same_name_that_is_another_is_read_anew(models: Path, tmp_path: Path) -> None:
    engine = make(models, tmp_path)
    engine.load(checkpoint(models))
    before = paint(engine, task(tmp_path, checkpoint(models)))
    other = replace(checkpoint(models, micro.ONE_FILE, "b"), name=micro.MODEL)
    assert apart(before, paint(engine, task(tmp_path, other))) <= 4
    assert [model.name for model in engine.loaded()] == [micro.MODEL]


def test_one_of_a_batch_is_cancelled_and_the_others_go_on(
    shared: DiffusersEngine, models: Path, tmp_path: Path
) -> None:
    model = checkpoint(models)
    tasks = [task(tmp_path, model, seed=seed) for seed in (1, 2, 3)]
    alone = [paint(shared, one) for one in tasks]
    tasks[1].output_folder.joinpath("job-2.png").unlink()
    reports = [Recorder(), Recorder(lambda done: done >= 1), Recorder()]
    ended = batch(shared, tasks, reports)
    assert isinstance(ended[1], Cancelled)
    assert not list(tasks[1].output_folder.iterdir())
    for index in (0, 2):
        assert apart(alone[index], pixels(ended[index])) <= 2
        assert reports[index].steps[-1] == (3, 3)


@pytest.mark.parametrize("step", [0, 2, 3])
def test_cancelled_at_any_point_it_leaves_no_file(
    shared: DiffusersEngine, models: Path, tmp_path: Path, step: int
) -> None:
    """Before the first step, before the picture is decoded, and when its file has just been written."""
    one = task(tmp_path, checkpoint(models))
    shared.load(one.model)
    with pytest.raises(Cancelled):
        shared.run(one, Recorder(lambda done: done >= step))
    assert not list(one.output_folder.iterdir())


def test_progress_follows_the_steps_and_previews_show_the_picture(
    shared: DiffusersEngine, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleet_agent.engines.diffusers.engine._PREVIEW_SECONDS", 0.0)
    report, one = Recorder(), task(tmp_path, checkpoint(models), steps=5)
    shared.load(one.model)
    picture = pixels(shared.run(one, report))
    assert [step for step, _ in report.steps] == [1, 2, 3, 4, 4, 5]
    assert len(report.previews) == 5
    last = tmp_path / "preview.jpg"
    last.write_bytes(report.previews[-1][1])
    with Image.open(last) as image:
        assert image.size[0] == image.size[1] >= 64
        shown = np.asarray(image.resize((64, 64))).astype(np.int16)
    # What is shown is this picture, more than any other: bright where it is bright. (Random weights blur much.)
    others = [paint(shared, task(tmp_path, checkpoint(models), seed=seed, steps=5)) for seed in (2, 3, 4)]
    assert alike(shown, picture) > max(0.2, *(alike(shown, other) for other in others))


def alike(left: Pixels, right: Pixels) -> float:
    """Correlation of the brightness."""
    return float(np.corrcoef(left.mean(axis=2).ravel(), right.mean(axis=2).ravel())[0, 1])


@pytest.mark.parametrize("limit", [2, 1])
def test_where_memory_runs_out_fewer_are_made_at_once(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    engine, model = make(models, tmp_path), checkpoint(models)
    tasks = [task(tmp_path, model, seed=seed, prompt=PROMPTS[seed - 1]) for seed in (1, 2, 3, 4)]
    alone = [paint(engine, one) for one in tasks]
    rows = shrink(engine, model, monkeypatch, lambda count: count > 2 * limit)
    for index, result in enumerate(batch(engine, tasks)):
        assert apart(alone[index], pixels(result)) <= 2
    assert max(rows) == 8 and rows[-1] == 2 * limit


def test_who_has_ended_is_not_made_again_where_memory_runs_out(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, model = make(models, tmp_path), checkpoint(models)
    tasks = [task(tmp_path, model, seed=seed) for seed in (1, 2, 3)]
    reports = [Recorder(), Recorder(lambda done: done >= 1), Recorder()]
    rows = shrink(engine, model, monkeypatch, lambda count: len(rows) == 2)
    engine.load(model)
    ends = list(engine.run_batch(tasks, reports))
    assert [place for place, _ in ends] == [1, 0, 2]
    assert [isinstance(end, Cancelled) for _, end in ends] == [True, False, False]
    assert rows == [6, 6, *[2] * 6]
    # How far they are never falls, though two began anew.
    assert [step for step, _ in reports[0].steps] == [1, 1, 2, 2, 3]


def shrink(
    engine: DiffusersEngine, model: ModelFile, monkeypatch: pytest.MonkeyPatch, full: Callable[[int], bool]
) -> list[int]:
    """A device whose memory runs out where `full` says so of the rows; gives the rows of each try."""
    import torch

    engine.load(model)
    unet = engine._parts()[1].device[model.name].pipeline.unet
    forward, rows = unet.forward, []

    def limited(sample: Any, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(sample))
        if full(len(sample)):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(unet, "forward", limited)
    return rows


def test_where_one_alone_does_not_fit_it_says_so(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the others have left the device, and after it was tried slowly."""
    engine, model = make(models, tmp_path), checkpoint(models)
    engine.load(checkpoint(models, micro.ONE_FILE, "b"))
    rows = shrink(engine, model, monkeypatch, lambda count: True)
    with pytest.raises(EngineError, match="ask for a smaller one") as raised:
        batch(engine, [task(tmp_path, model)])
    assert raised.value.reason == "OUT_OF_MEMORY"
    assert len(rows) == 3
    assert [one.name for one in engine.loaded()] == [micro.MODEL]


def test_a_picture_to_begin_with(shared: DiffusersEngine, models: Path, tmp_path: Path) -> None:
    from fleet_agent.engines.base import InputFile

    model = checkpoint(models)
    noise = np.random.default_rng(3).integers(0, 255, (64, 64, 3), np.uint8)
    files = {}
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    for name, image in (("output:init", Image.fromarray(noise)), ("output:mask", Image.fromarray(mask))):
        path = tmp_path / name.replace(":", "-")
        image.save(path, "PNG")
        files[name] = (InputFile(path, "image/png"),)

    def from_it(seed: int = 1, **fields: Any) -> Pixels:
        one = replace(task(tmp_path, model, seed, init_image="output:init", steps=4, **fields), inputs=files)
        return paint(shared, one)

    kept = from_it(strength=0.0)
    assert apart(kept, from_it(seed=9, strength=0.0)) == 0
    assert apart(kept, from_it(strength=0.5)) > 8
    assert apart(from_it(strength=0.5), from_it(seed=9, strength=0.5)) > 8
    painted = from_it(strength=1.0, mask_image="output:mask")
    assert apart(kept, painted) > 8
    # The decoder sees the whole at every pixel; of the latents just the masked ones are painted.
    one = replace(task(tmp_path, model, init_image="output:init", mask_image="output:mask"), inputs=files)
    loaded = shared._parts()[1].device[model.name]
    request = shared._request(one)
    start = start_of(one, 64, 64)
    assert start is not None
    rows = [denoise.Row(request, start), denoise.Row(request, replace_mask(start))]
    *_, last = denoise.steps(loaded, rows)
    untouched = encoded(start.picture, loaded.pipeline.vae)[0].detach()
    assert float((last.latents[0, :, :, :4] - untouched[:, :, :4]).abs().max()) < 1e-5
    assert float((last.latents[0, :, :, 4:] - untouched[:, :, 4:]).abs().min()) > 1e-4
    assert float((last.latents[1] - untouched).abs().max()) < 1e-5


def replace_mask(start: Start) -> Start:
    """The same with nothing to paint."""
    assert start.mask is not None
    return replace(start, mask=np.zeros_like(start.mask))


@pytest.mark.parametrize("name", ["euler_a", "dpmpp_2m_karras", "ddim", "heun", "unipc"])
def test_schedulers_by_name(shared: DiffusersEngine, models: Path, tmp_path: Path, name: str) -> None:
    """Also those that draw noise at each step: a seed gives one picture, in a batch too."""
    model = checkpoint(models)
    tasks = [task(tmp_path, model, seed=seed, scheduler=name) for seed in (1, 2)]
    alone = [paint(shared, one) for one in tasks]
    assert apart(alone[0], paint(shared, tasks[0])) == 0
    for index, result in enumerate(batch(shared, tasks)):
        assert apart(alone[index], pixels(result)) <= 2


def test_bad_fields_name_themselves(shared: DiffusersEngine, models: Path, tmp_path: Path) -> None:
    model = checkpoint(models)
    for fields, words in (
        ({"scheduler": "none"}, "scheduler: diffusers knows"),
        ({"width": 100}, "width: must be a multiple of 8"),
        ({"prompt": " "}, "prompt: must be"),
    ):
        with pytest.raises(EngineError, match=words) as raised:
            paint(shared, task(tmp_path, model, **fields))
        assert raised.value.reason == "INVALID_FIELD"
    with pytest.raises(EngineError) as raised:
        shared.load(checkpoint(models, "gone"))
    assert raised.value.reason == "MODEL_NOT_FOUND"
    with pytest.raises(EngineError, match="FLEET_DIFFUSERS_MAX_BATCH: must be from 1 to 64"):
        Options.of({"FLEET_DIFFUSERS_MAX_BATCH": "0"})


def test_like_requests_share_a_key(shared: DiffusersEngine, models: Path, tmp_path: Path) -> None:
    model = checkpoint(models)
    key = shared.batch_key(task(tmp_path, model))
    assert shared.batch_key(task(tmp_path, model, seed=5, prompt="b", negative_prompt="", guidance_scale=3.0)) == key
    for fields in ({"width": 128}, {"steps": 4}, {"scheduler": "ddim"}, {"guidance_scale": 1.0}, {"init_image": "x"}):
        assert shared.batch_key(task(tmp_path, model, **fields)) != key, fields
    assert shared.batch_limit(task(tmp_path, model)) == 16
    assert shared.batch_limit(task(tmp_path, model, width=1024, height=1024)) == 4
    assert shared.batch_limit(task(tmp_path, model, width=2048, height=2048)) == 1
