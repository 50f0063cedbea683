"""How the diffusers engine uses a machine: types, tiers, compiled shapes, several GPUs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fleet_agent.engines.base import EngineError, InputFile
from fleet_agent.engines.diffusers import denoise
from fleet_agent.engines.diffusers.device import device_of
from fleet_agent.engines.diffusers.model import Model
from fleet_agent.engines.diffusers.options import Options
from fleet_agent.engines.diffusers.shelf import Shelf
from fleet_agent.engines.image import ImageRequest
from fleet_agent.engines.start import start_of
from tests.diffusers import micro
from tests.diffusers.test_engine import apart, checkpoint, lora, make, paint, task

# What diffusers and torch do with each other and with NumPy is theirs.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning", "UserWarning")
]
REQUEST = ImageRequest("a boat", "blurry", 64, 64, 3, 5.0, 4, "default")


def read(models: Path, name: str = micro.MODEL, **options: Any) -> Model:
    return Model.read(checkpoint(models, name), models, device_of(Options("cpu", **options)))


def latents(model: Model, request: ImageRequest = REQUEST) -> Any:
    *_, last = denoise.steps(model, [denoise.Row(request, None)])
    return last.latents[0]


def test_a_picture_is_what_the_pipeline_of_diffusers_makes(models: Path, tmp_path: Path) -> None:
    import torch
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(
        models / "checkpoints" / micro.MODEL, local_files_only=True, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a red boat",
        negative_prompt="blurry",
        width=64,
        height=64,
        num_inference_steps=4,
        guidance_scale=6.0,
        generator=torch.Generator("cpu").manual_seed(11),
    ).images[0]
    one = task(tmp_path, checkpoint(models), 11, prompt="a red boat", steps=4, guidance_scale=6.0)
    assert apart(paint(make(models, tmp_path), one), np.asarray(theirs).astype(np.int16)) <= 1


@pytest.mark.parametrize("name", [micro.MODEL, micro.ONE_FILE])
def test_it_computes_in_the_type_that_was_asked_for(models: Path, name: str) -> None:
    import torch

    plain, half = read(models, name), read(models, name, dtype="bfloat16")
    assert {one.dtype for one in half.pipeline.unet.parameters()} == {torch.bfloat16}
    assert half.memory_bytes < plain.memory_bytes * 0.51
    assert float((latents(half) - latents(plain)).abs().mean() / latents(plain).abs().mean()) < 0.1


def test_float8_keeps_the_weights_alone_and_takes_loras_as_they_are(models: Path) -> None:
    from safetensors.torch import load_file

    plain, small = read(models), read(models, storage="float8")
    assert small.memory_bytes < plain.memory_bytes * 0.6
    bare, without = latents(plain), latents(small)
    for model in (plain, small):
        model.loras.apply(lora(models, 0.3))
    # What it does, it does much alike.
    effect = (latents(plain) - bare).abs().mean()
    assert float((latents(small) - latents(plain)).abs().mean() / effect) < 0.5
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    module = small.pipeline.unet.get_submodule(layer)
    file = load_file(models / "loras" / micro.LORA)
    assert float((module.lora_A["lora_1"].weight - file[f"unet.{layer}.lora_A.weight"]).abs().max()) == 0
    small.loras.apply(())
    assert float((latents(small) - without).abs().max()) == 0


def test_the_decoder_that_overflows_in_float16_does_not_run_in_it(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the picture, for what a job begins with, and for the colours of previews."""
    import torch

    from fleet_agent.engines.diffusers import preview, vae

    model = read(models, dtype="float16")
    decoder = model.pipeline.vae
    decoder.register_to_config(force_upcast=True)
    seen = []

    def watched(real: Any, given: Any, **more: Any) -> Any:
        seen.append(given.dtype)
        return real(given, **more)

    for name in ("decode", "encode"):
        monkeypatch.setattr(decoder, name, functools.partial(watched, getattr(decoder, name)))
    vae.decoded(decoder, torch.zeros(4, 8, 8))
    vae.encoded(np.zeros((64, 64, 3), np.uint8), decoder)
    preview.learn(decoder)
    assert seen == [torch.float32] * 3
    assert decoder.dtype == torch.float16
    decoder.register_to_config(force_upcast=False)
    vae.decoded(decoder, torch.zeros(4, 8, 8))
    assert seen[-1] == torch.float16


def test_a_step_is_told_when_it_is_done_while_the_next_is_at_work(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, which takes work faster than it does it."""
    model = read(models)
    story: list[str] = []

    def mark(device: str) -> Any:
        number = sum(word.startswith("given") for word in story) + 1
        story.append(f"given {number}")
        return SimpleNamespace(synchronize=lambda: story.append(f"done {number}"))

    monkeypatch.setattr(denoise, "mark", mark)
    story.extend(f"told {step.done}" for step in denoise.steps(model, [denoise.Row(REQUEST, None)]))
    assert story == ["given 1", "given 2", "done 1", "told 1", "given 3", "done 2", "told 2", "done 3", "told 3"]


class Compiler:
    """torch.compile: which UNets it was given, and how many rows what it made has run."""

    def __init__(self, works: bool = True) -> None:
        self.works = works
        self.rows: list[int] = []
        self.kinds: set[Any] = set()
        self.modes: list[Any] = []

    def __call__(self, unet: Any, *, mode: Any, dynamic: bool) -> Any:
        assert not dynamic
        self.modes.append(mode)

        def run(sample: Any, timestep: Any, *, encoder_hidden_states: Any, **more: Any) -> Any:
            if not self.works:
                raise RuntimeError("no compiler")
            self.rows.append(len(sample))
            self.kinds.add((sample.stride(), sample.dtype, timestep.dtype, encoder_hidden_states.shape[1]))
            return unet(sample, timestep, encoder_hidden_states=encoder_hidden_states, **more)

        return run


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    import torch

    compiler = Compiler()
    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    yield compiler


def test_what_is_compiled_is_compiled_before_the_first_job(models: Path, tmp_path: Path, compiler: Compiler) -> None:
    """For one picture and for a full batch of the sizes named; all else runs as it is, and so do LoRAs."""
    engine, model = make(models, tmp_path, compile="on", warm="64x64", max_batch=1), checkpoint(models)
    engine.load(model)
    assert compiler.rows == [2] * 8 + [32] * 8
    [loaded] = engine.loaded()
    assert loaded.pixel_steps_per_second is not None and loaded.pixel_steps_per_second > 64 * 64 / 60
    compiler.rows.clear()
    engine.load(model)
    assert compiler.rows == []
    paint(engine, task(tmp_path, model))
    assert compiler.rows == [2] * 3
    paint(engine, task(tmp_path, model, width=128))
    paint(engine, task(tmp_path, model, loras=lora(models)))
    assert compiler.rows == [2] * 3
    paint(engine, task(tmp_path, model))
    assert compiler.rows == [2] * 6
    assert len(compiler.modes) == 1


def test_what_is_compiled_sees_one_kind_of_input(models: Path, tmp_path: Path, compiler: Compiler) -> None:
    """Whatever the scheduler and wherever latents come from: another kind would be compiled in the midst of a job."""
    import torch

    engine, model = make(models, tmp_path, compile="on", warm="64x64", max_batch=1), checkpoint(models)
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "teal", "PNG")
    files = {"output:x": (InputFile(tmp_path / "teal", "image/png"),)}
    engine.load(model)
    loaded = engine._parts()[1].device[model.name]
    loaded.pipeline.vae.to(memory_format=torch.channels_last)
    compiler.rows.clear()
    for fields in ({"scheduler": "ddim"}, {"scheduler": "dpmpp_2m"}, {"init_image": "output:x", "strength": 1.0}):
        paint(engine, replace(task(tmp_path, model, **fields), inputs=files))
    assert compiler.rows == [2] * 9
    assert len(compiler.kinds) == 1
    paint(engine, task(tmp_path, model, prompt="tower " * 60))
    assert compiler.rows == [2] * 9


def test_one_that_comes_back_to_the_device_is_made_ready_again(
    models: Path, tmp_path: Path, compiler: Compiler
) -> None:
    """What was compiled for it knows where it was."""
    engine = make(models, tmp_path, compile="on", warm="64x64", max_batch=1, memory_bytes=1)
    first, second = checkpoint(models), checkpoint(models, micro.ONE_FILE, "b")
    for one in (first, second, first):
        engine.load(one)
    assert len(compiler.modes) == 3
    assert list(engine._parts()[1].host) == [second.name]


def test_where_nothing_can_be_compiled_jobs_run_all_the_same(models: Path, tmp_path: Path, compiler: Compiler) -> None:
    compiler.works = False
    engine, model = make(models, tmp_path, compile="on", warm="64x64"), checkpoint(models)
    engine.load(model)
    assert engine.loaded()[0].pixel_steps_per_second is None
    plain = paint(make(models, tmp_path), task(tmp_path, model))
    assert apart(plain, paint(engine, task(tmp_path, model))) == 0


def test_sizes_to_be_made_ready_for() -> None:
    assert Options().sizes(gpu=True) == ((1024, 1024),) and Options().sizes(gpu=False) == ()
    given = Options.of({"FLEET_DIFFUSERS_WARM": "832x1216, 512x512"})
    assert given.sizes(gpu=False) == ((832, 1216), (512, 512))
    assert Options.of({"FLEET_DIFFUSERS_WARM": "off"}).sizes(gpu=True) == ()
    for text in ("large", "100x100", "64x", "4096x4096"):
        with pytest.raises(EngineError, match="FLEET_DIFFUSERS_WARM: "):
            Options.of({"FLEET_DIFFUSERS_WARM": text})


def test_a_frugal_model_has_its_parts_on_the_device_only_while_they_work(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, moves = read(models), []
    plain = latents(model)
    monkeypatch.setattr(Model, "_move", lambda self, part, where: moves.append((part, where)))
    monkeypatch.setattr(model, "_device", SimpleNamespace(name="cuda", is_gpu=True))
    with model.at_work("vae"):
        assert moves == []
    model.be_frugal()
    assert moves == [(part, "cpu") for part in ("vae", "text_encoder", "text_encoder_2")]
    moves.clear()
    model.to_device()
    assert moves == [("unet", "cuda")]
    moves.clear()
    with pytest.raises(KeyError), model.at_work("vae"):
        assert moves == [("vae", "cuda")]
        raise KeyError
    assert moves == [("vae", "cuda"), ("vae", "cpu")]
    moves.clear()
    monkeypatch.setattr(model, "_device", device_of(Options("cpu")))
    assert float((latents(model) - plain).abs().max()) == 0
    assert [part for part, _ in moves] == ["text_encoder", "text_encoder_2"] * 2 + ["vae"] * 2


def test_one_that_does_not_fit_is_tried_alone_and_then_in_parts(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    engine = make(models, tmp_path)
    device, shelf = engine._parts()
    engine.load(checkpoint(models, micro.ONE_FILE, "b"))

    def to_device(self: Model) -> None:
        if not self.frugal:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(device), "is_gpu", property(lambda self: True))
    monkeypatch.setattr(Model, "to_device", to_device)
    monkeypatch.setattr(Model, "_move", lambda *args: None)
    engine.load(checkpoint(models))
    assert list(shelf.device) == [micro.MODEL] and shelf.device[micro.MODEL].frugal
    monkeypatch.setattr(Model, "to_device", lambda self: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    engine.unload(micro.MODEL)
    with pytest.raises(EngineError, match="does not fit into the memory of cpu") as raised:
        engine.load(checkpoint(models))
    assert raised.value.reason == "OUT_OF_MEMORY" and engine.loaded() == []


def test_each_slot_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    chosen: list[Any] = []
    gpu = SimpleNamespace(total_memory=10_000)
    for name, value in (
        ("is_available", lambda: True),
        ("device_count", lambda: 2),
        ("set_device", chosen.append),
        ("get_device_properties", lambda name: gpu),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    found = [device_of(Options(), {"slot": str(slot), "slots": "3"}) for slot in range(3)]
    assert [device.name for device in found] == ["cuda:0", "cuda:1", "cuda:0"] == chosen
    assert {device.memory_bytes for device in found} == {4_500}
    one = device_of(Options(), {"slot": "0", "slots": "2"})
    assert (one.memory_bytes, one.compile, one.dtype, one.sizes) == (9_000, True, torch.float16, ((1024, 1024),))
    assert device_of(Options(memory_bytes=7), {}).memory_bytes == 7
    assert device_of(Options(device="cuda", compile="off")).compile is False
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda name: (100, 10_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda name: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda name: 20)
    assert one.free_bytes() == 130
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="torch sees no such GPU"):
        device_of(Options(device="cuda"))


class Box:
    def __init__(self, size: int) -> None:
        self.memory_bytes = size

    def to_device(self) -> None:
        return None

    def to_host(self) -> None:
        return None


def test_what_other_programs_have_is_no_room() -> None:
    left = [100]
    shelf: Shelf[Box] = Shelf(1_000, 1_000, lambda: left[0])
    for name in ("a", "b"):
        shelf.take(name, lambda: Box(40), 40)
    assert list(shelf.device) == ["a", "b"]
    left[0] = 30
    shelf.take("c", lambda: Box(40), 40)
    assert list(shelf.device) == ["c"] and list(shelf.host) == ["a", "b"]


def test_schedulers_of_two_parts_begin_with_a_whole_step(models: Path, tmp_path: Path) -> None:
    """From a picture: a heun that began in the middle of a step would not know where it came from."""
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "teal", "PNG")
    model = read(models)
    for strength, parts in ((0.25, 1), (0.5, 3), (1.0, 7)):
        fields: dict[str, Any] = {"init_image": "output:x", "strength": strength, "scheduler": "heun", "steps": 4}
        files = {"output:x": (InputFile(tmp_path / "teal", "image/png"),)}
        one = replace(task(tmp_path, checkpoint(models), **fields), inputs=files)
        begun = start_of(one, 64, 64)
        request = make(models, tmp_path)._request(one)
        told = [step.of for step in denoise.steps(model, [denoise.Row(request, begun)])]
        assert told == [parts] * parts
