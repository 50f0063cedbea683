"""The diffusers engine against StableDiffusionXLPipeline: `python -m bench.sdxl [--size N] [--steps 20 30]`.

Where there is a GPU: SDXL in its full size with random weights, 1024x1024, float16. Elsewhere the tiny SDXL of the
tests, 128x128, float32, one thread, which says nothing of a GPU. Both sides get the same weights, type, scheduler,
steps, VAE, guidance and channels-last layout, both are warmed, and they take turns in one process; each time ends with
a PNG on the disk. Then pictures go through a whole `fleet up`.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fleet_client import FleetCommander

from bench._machine import heading
from bench._sdxl_model import MODEL as FULL
from bench._sdxl_model import make_full
from fleet_agent.engines.base import EngineResult, EngineSettings, ModelFile, Task
from fleet_agent.engines.diffusers.engine import DiffusersEngine
from fleet_agent.engines.diffusers.options import Options
from tests.diffusers import micro
from tests.e2e.fleet_process import FleetProcess

PROMPT, NEGATIVE, GUIDANCE = "a red boat on a quiet sea", "blurry", 5.0


@dataclass(frozen=True)
class Setting:
    """What is measured, and where."""

    gpu: bool
    size: int
    steps: int
    rounds: int
    batch: int

    @property
    def device(self) -> str:
        return "cuda" if self.gpu else "cpu"

    @property
    def model(self) -> str:
        return FULL if self.gpu else micro.MODEL


class Quiet:
    """A Reporter that nobody listens to."""

    def check(self) -> None:
        return None

    def progress(self, step: int, steps: int, message: str | None = None) -> None:
        return None

    def preview(self, content_type: str, data: bytes) -> None:
        return None

    def text(self, text: str) -> None:
        return None

    def frame(self, frame: str | bytes) -> None:
        return None


def main() -> None:
    """Prints the tables, and what was not run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 30])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--no-fleet", action="store_true", help="leave the whole fleet out")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import diffusers
        import torch
    except ImportError as error:
        say(f"not run: {error}; pip install 'fleet-commander[diffusers]'\n")
        return
    diffusers.utils.logging.disable_progress_bar()
    gpu = torch.cuda.is_available()
    # Threads that wait for each other measure what else the machine does.
    torch.set_num_threads(torch.get_num_threads() if gpu else 1)
    size = options.size or (1024 if gpu else 128)
    where = torch.cuda.get_device_name() if gpu else "the processor"
    say(heading() + f"torch {torch.__version__}, diffusers {diffusers.__version__}, {where}\n")
    with tempfile.TemporaryDirectory(prefix="fleet-bench-") as folder:
        models = Path(folder) / "models"
        if gpu:
            make_full(models, "cuda", torch.float16)
            gc.collect()
            torch.cuda.empty_cache()
        else:
            micro.make(models)
        settings = [Setting(gpu, size, steps, options.rounds, options.batch) for steps in options.steps]
        compare(settings, models, Path(folder))
        if not options.no_fleet:
            # The fleet's own process is to have the GPU.
            gc.collect()
            if gpu:
                torch.cuda.empty_cache()
            through_the_fleet(settings, models, Path(folder))
    if not gpu:
        say("\nNot run: SDXL in its full size, on any GPU. A model of 4 MB on a processor is no evidence for one.\n")


def compare(settings: list[Setting], models: Path, folder: Path) -> None:
    """Both sides by turns in this process."""
    first = settings[0]
    begun = time.perf_counter()
    pipeline = loaded_pipeline(first, models)
    theirs_load = time.perf_counter() - begun
    engine, model = make_engine(first, models, folder)
    begun = time.perf_counter()
    read = engine.load(model).load_seconds
    whole = time.perf_counter() - begun
    say(f"\nread from the disk: pipeline {theirs_load:.1f} s, ours {read:.1f} s; ")
    say(f"ours then moves, compiles and warms up: {whole - read:.1f} s\n\n")
    say(f"| {first.size}x{first.size} | pipeline, s an image | ours | pipeline / ours |\n" + "|---" * 4 + "|\n")
    for setting in settings:
        many = setting.batch

        def sides(count: int, setting: Setting = setting) -> list[list[float]]:
            both = measured(
                setting.rounds,
                partial(piped, pipeline, setting, count, folder),
                partial(engined, engine, model, setting, count, folder),
            )
            return [[seconds / count for seconds in side] for side in both]

        alone, together = sides(1), sides(many)
        row(f"{setting.steps} steps, one at a time", alone)
        row(f"{setting.steps} steps, {many} in a batch on both sides", together)
        row(f"{setting.steps} steps, ours {many} in a batch, pipeline one at a time", [alone[0], together[1]])


def measured(rounds: int, *sides: Callable[[], None]) -> list[list[float]]:
    """Seconds of each round and side, after two that do not count."""
    seconds: list[list[float]] = [[] for _ in sides]
    for index in range(rounds + 2):
        for side in range(len(sides)):
            place = (side + index) % len(sides)
            begun = time.perf_counter()
            sides[place]()
            if index >= 2:
                seconds[place].append(time.perf_counter() - begun)
    return seconds


def row(name: str, sides: list[list[float]]) -> None:
    """Medians and ranges of both, and of their ratio by rounds."""
    theirs, ours = sides
    cells = [spread(side, "{:.3f}") for side in (theirs, ours, [a / b for a, b in zip(theirs, ours, strict=True)])]
    say(f"| {name} | {' | '.join(cells)} |\n")


def spread(values: list[float], form: str) -> str:
    median, low, high = (form.format(f(values)) for f in (statistics.median, min, max))
    return f"{median} [{low} - {high}]"


def loaded_pipeline(setting: Setting, models: Path) -> Any:
    """As its documentation says, in our layout of memory."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    dtype = torch.float16 if setting.gpu else torch.float32
    path = models / "checkpoints" / setting.model
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        path, local_files_only=True, dtype=dtype, add_watermarker=False
    )
    pipeline.to(setting.device)
    if setting.gpu:
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def piped(pipeline: Any, setting: Setting, count: int, folder: Path) -> None:
    import torch

    made = pipeline(
        [PROMPT] * count,
        negative_prompt=[NEGATIVE] * count,
        width=setting.size,
        height=setting.size,
        num_inference_steps=setting.steps,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(count)],
    )
    for index, image in enumerate(made.images):
        image.save(folder / f"theirs-{index}.png")


def make_engine(setting: Setting, models: Path, folder: Path) -> tuple[DiffusersEngine, ModelFile]:
    warm = f"{setting.size}x{setting.size}" if setting.gpu else "off"
    engine = DiffusersEngine(EngineSettings(models, folder), Options(max_batch=setting.batch, warm=warm))
    path = models / "checkpoints" / setting.model
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return engine, ModelFile(setting.model, path, "checkpoint", size, "a", "sdxl")


def engined(engine: DiffusersEngine, model: ModelFile, setting: Setting, count: int, folder: Path) -> None:
    fields = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "width": setting.size,
        "height": setting.size,
        "steps": setting.steps,
        "guidance_scale": GUIDANCE,
    }
    tasks = [Task(f"ours-{seed}", "image_gen", model, (), fields, seed, folder) for seed in range(count)]
    for _, ended in engine.run_batch(tasks, [Quiet() for _ in tasks]):
        assert isinstance(ended, EngineResult), ended


def through_the_fleet(settings: list[Setting], models: Path, folder: Path) -> None:
    """One picture at a time, by POST /api/fleet/generate: what the fleet adds to the engine's run."""
    environment = {
        "FLEET_ENGINES": "diffusers",
        "FLEET_AGENT_MODELS_DIR": str(models),
        "FLEET_DEFAULT_MODEL": settings[0].model,
        "FLEET_DIFFUSERS_WARM": f"{settings[0].size}x{settings[0].size}" if settings[0].gpu else "off",
    }
    if not settings[0].gpu:
        environment["OMP_NUM_THREADS"] = "1"
    say("\n| through a fleet, one at a time | request to reply, s | the engine's run, s | what the fleet adds |\n")
    say("|---" * 4 + "|\n")
    with FleetProcess(folder / "data", environment=environment) as fleet, FleetCommander(fleet.url) as client:
        for setting in settings:
            whole, runs = [], []
            for index in range(setting.rounds + 2):
                begun = time.perf_counter()
                reply = client.call("POST", "/api/fleet/generate", json=body(setting, index), timeout=300)
                seconds = time.perf_counter() - begun
                [job] = client.list_jobs(limit=1)["jobs"]
                if index >= 2:
                    assert reply.content.startswith(b"\x89PNG")
                    whole.append(seconds)
                    runs.append(float(job["timings"]["run_seconds"]))
            shares = [100 * (a - b) / b for a, b in zip(whole, runs, strict=True)]
            cells = (spread(whole, "{:.3f}"), spread(runs, "{:.3f}"), spread(shares, "{:.1f} %"))
            say(f"| {setting.steps} steps | {' | '.join(cells)} |\n")


def body(setting: Setting, seed: int) -> dict[str, Any]:
    fields = {"width": setting.size, "height": setting.size, "steps": setting.steps, "guidance_scale": GUIDANCE}
    return {"prompt": PROMPT, "negative_prompt": NEGATIVE, "seed": seed, **fields}


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
