"""The `diffusers` engine: SDXL from a folder or one file, batches of like requests, models by least recent use."""

from __future__ import annotations

import importlib.util
import io
import os
import time
from collections.abc import Hashable, Iterator, Sequence
from importlib import metadata
from typing import Any

from PIL import Image

from fleet_agent.engines import png
from fleet_agent.engines.base import (
    Cancelled,
    EngineError,
    EngineInfo,
    EngineOutput,
    EngineResult,
    EngineSettings,
    LoadedModel,
    LoraUse,
    ModelFile,
    Reporter,
    Task,
)
from fleet_agent.engines.batch import Ended
from fleet_agent.engines.diffusers import denoise
from fleet_agent.engines.diffusers.device import Device, device_of
from fleet_agent.engines.diffusers.model import Model
from fleet_agent.engines.diffusers.options import Options
from fleet_agent.engines.diffusers.preview import picture
from fleet_agent.engines.diffusers.schedulers import NAMES, OWN
from fleet_agent.engines.diffusers.shelf import Shelf
from fleet_agent.engines.diffusers.vae import decoded
from fleet_agent.engines.diffusers.warm import batch_limit, warm_up
from fleet_agent.engines.image import ImageRequest, preview_bytes, request_of, texts_of
from fleet_agent.engines.start import start_of

NAME = "diffusers"
ARCHITECTURE = "sdxl"
_NEEDS = ("torch", "diffusers", "transformers", "accelerate", "peft")
_PREVIEW_SECONDS = 0.5
_PREVIEW_SIDE = 384
_PIXEL_BYTES = 3 * 256 * 4
"""What a pixel takes while its picture is made: in, out and a copy of the decoder's widest layer, in float32."""


class DiffusersEngine:
    """Makes pictures with Stable Diffusion XL. Nothing heavy is imported before the first model is asked for."""

    def __init__(self, settings: EngineSettings, options: Options | None = None) -> None:
        self._settings = settings
        self._options = options or Options.of({**os.environ, **settings.options})
        self._made: tuple[Device, Shelf[Model]] | None = None

    def info(self) -> EngineInfo:
        """Raises EngineError where a package is missing."""
        missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
        if missing:
            raise EngineError(
                "ENGINE_FAILED",
                f"needs {', '.join(missing)}: pip install 'fleet-commander[diffusers]', then start again",
            )
        return EngineInfo(
            NAME,
            metadata.version("diffusers"),
            ("image_gen",),
            detail="Stable Diffusion XL",
            architectures=(ARCHITECTURE,),
        )

    def load(self, model: ModelFile | None, loras: tuple[LoraUse, ...] = ()) -> LoadedModel:
        """Has the model on the device and its LoRAs beside it. Raises EngineError."""
        if model is None:
            raise EngineError("MODEL_NOT_FOUND", "model: name one; put an SDXL checkpoint into the node's model folder")
        device, shelf = self._parts()
        try:
            found = self._taken(model)
            if (found.file.sha256 or model.sha256) != model.sha256:
                # Another file of this name.
                shelf.drop(model.name)
                found = self._taken(model)
            found.loras.have(loras)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            shelf.drop(model.name)
            raise EngineError(
                "OUT_OF_MEMORY", f"{model.name} does not fit into the memory of {device.name}", True
            ) from error
        return _loaded(found)

    def _taken(self, model: ModelFile) -> Model:
        """The model on the device; where it does not fit there, all others leave, then its own parts but the UNet."""
        device, shelf = self._parts()

        def read() -> Model:
            return Model.read(model, self._settings.models_folder, device)

        on_device = model.name in shelf.device
        found: Model | None = None
        try:
            found = shelf.take(model.name, read, model.size_bytes)
        except Exception as error:
            if not _is_out_of_memory(error) or not device.is_gpu:
                raise
        if found is None:
            # Not within the handler: the error knows who holds what is to be freed.
            shelf.only("")
            _free()
            found = shelf.take(model.name, lambda: _frugal(read()), model.size_bytes)
        if not on_device and not found.frugal:
            # Not a part of any job: what is compiled now, none waits for.
            warm_up(found, self._options.max_batch)
        return found

    def unload(self, model: str) -> None:
        if self._made is not None and self._made[1].drop(model):
            _free()

    def loaded(self) -> list[LoadedModel]:
        if self._made is None:
            return []
        return [_loaded(model) for _, model in sorted(self._made[1].device.items())]

    def estimate(self, task: Task) -> int:
        request = self._request(task)
        return request.width * request.height * _PIXEL_BYTES

    def run(self, task: Task, report: Reporter) -> EngineResult:
        """As a batch of one."""
        for _, ended in self.run_batch([task], [report]):
            if isinstance(ended, EngineResult):
                return ended
            raise ended
        raise EngineError("ENGINE_FAILED", "the batch ended without a word of its task", retryable=True)

    def batch_limit(self, task: Task) -> int:
        """Fewer of larger pictures: as many pixels as `max_batch` pictures of 1024 x 1024 have."""
        request = self._request(task)
        return batch_limit(self._options.max_batch, request.width, request.height)

    def batch_key(self, task: Task) -> Hashable:
        request = self._request(task)
        begins = task.fields.get("init_image") is not None, task.fields.get("mask_image") is not None
        strength = task.fields.get("strength") if begins[0] else None
        guided = request.guidance_scale > 1
        return request.width, request.height, request.steps, request.scheduler, guided, begins, strength

    def run_batch(self, tasks: Sequence[Task], reports: Sequence[Reporter]) -> Iterator[tuple[int, Ended]]:
        """Tasks whose prompts take as many chunks share a loop; where memory lacks, half as many do."""
        _, shelf = self._parts()
        assert tasks[0].model is not None
        self.load(tasks[0].model, tasks[0].loras)
        model = shelf.device[tasks[0].model.name]
        model.loras.apply(tasks[0].loras)
        groups: dict[int, list[int]] = {}
        rows: dict[int, denoise.Row] = {}
        for place, task in enumerate(tasks):
            try:
                request = self._request(task)
                rows[place] = denoise.Row(request, start_of(task, request.width, request.height))
                groups.setdefault(denoise.rows_chunks(model, request), []).append(place)
            except EngineError as error:
                yield place, error
        waiting, reached = list(groups.values()), dict.fromkeys(rows, 0)
        while waiting:
            group = waiting.pop(0)
            batch = _Batch({place: rows[place] for place in group}, tasks, reports, model, reached)
            try:
                yield from batch.run()
            except Exception as error:
                if not _is_out_of_memory(error):
                    raise
                left = [place for place in group if place not in batch.ended]
                waiting[:0] = self._smaller(left, model, error)

    def _smaller(self, left: list[int], model: Model, error: Exception) -> list[list[int]]:
        """What to try after memory ran out: half as many at once; one alone on a device that it has for itself."""
        _free()
        if len(left) > 1:
            return [left[: len(left) // 2], left[len(left) // 2 :]]
        _, shelf = self._parts()
        if len(shelf.device) > 1:
            shelf.only(model.file.name)
            _free()
            return [left]
        if not model.frugal:
            model.be_frugal()
            return [left]
        raise EngineError(
            "OUT_OF_MEMORY",
            f"{model.file.name} and this picture do not fit into {self._device.name}: ask for a smaller one",
        ) from error

    @property
    def _device(self) -> Device:
        return self._parts()[0]

    def _parts(self) -> tuple[Device, Shelf[Model]]:
        if self._made is None:
            # What is compiled is found again by the next process.
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(self._settings.data_folder / "compiled"))
            device = device_of(self._options, self._settings.options)
            self._made = device, Shelf(device.memory_bytes, device.host_memory_bytes, device.free_bytes)
        return self._made

    def _request(self, task: Task) -> ImageRequest:
        return request_of(task, NAME, NAMES, default=OWN)


class _Batch:
    """Rows that share one loop. `ended` are the places whose end has been told, `reached` the steps that were."""

    def __init__(
        self,
        rows: dict[int, denoise.Row],
        tasks: Sequence[Task],
        reports: Sequence[Reporter],
        model: Model,
        reached: dict[int, int],
    ) -> None:
        self._rows, self._tasks, self._reports = rows, tasks, reports
        self._model = model
        self._reached = reached
        self._places = list(rows)
        self.ended: set[int] = set()
        self._told: list[tuple[int, Ended]] = []
        self._shown = time.monotonic()

    def run(self) -> Iterator[tuple[int, Ended]]:
        for step in denoise.steps(self._model, list(self._rows.values())):
            self._watch(step)
            yield from self._news()
            if len(self.ended) == len(self._places):
                return
        with self._model.at_work("vae"):
            # One at a time, since the decoder takes more memory than all else; each is told when it is there.
            for index, place in enumerate(self._places):
                if place not in self.ended:
                    self._end(place, self._written(place, decoded(self._model.pipeline.vae, step.latents[index])))
                    yield from self._news()

    def _news(self) -> Iterator[tuple[int, Ended]]:
        told, self._told = self._told, []
        yield from told

    def _end(self, place: int, how: Ended) -> None:
        self.ended.add(place)
        self._told.append((place, how))

    def _watch(self, step: denoise.Step) -> None:
        show = time.monotonic() - self._shown >= _PREVIEW_SECONDS
        if show:
            self._shown = time.monotonic()
        for index, place in enumerate(self._places):
            if place in self.ended:
                continue
            report, steps = self._reports[place], self._rows[place].request.steps
            try:
                # The last step is told when the file is there; one that is made anew does not fall back.
                done = min(steps * step.done // step.of, steps - 1)
                self._reached[place] = max(done, self._reached[place])
                report.progress(self._reached[place], steps)
                if show and self._tasks[place].previews:
                    report.preview("image/jpeg", self._preview(step.latents[index]))
            except Cancelled as cancelled:
                self._end(place, cancelled)

    def _preview(self, latent: Any) -> bytes:
        small = Image.fromarray(picture(latent, self._model.rgb))
        scale = max(1, _PREVIEW_SIDE // max(small.size))
        large = small.resize((small.width * scale, small.height * scale), Image.Resampling.BILINEAR)
        buffer = io.BytesIO()
        large.save(buffer, "JPEG", quality=80)
        return buffer.getvalue() if buffer.tell() <= 65_536 else preview_bytes(_array(large))

    def _written(self, place: int, pixels: Any) -> Ended:
        task, request, report = self._tasks[place], self._rows[place].request, self._reports[place]
        path = task.output_folder / f"{task.job_id}.png"
        texts = texts_of(task, request, self._model.file.name, engine=NAME, version=metadata.version("diffusers"))
        try:
            report.check()
            png.write(path, pixels, texts)
            report.progress(request.steps, request.steps)
        except Cancelled as cancelled:
            path.unlink(missing_ok=True)
            return cancelled
        except OSError as error:
            path.unlink(missing_ok=True)
            return EngineError("DISK_FULL", f"cannot write the picture: {error.strerror}", retryable=True)
        return EngineResult((EngineOutput(path, "image/png", request.width, request.height, seed=request.seed),))


def _array(image: Image.Image) -> Any:
    import numpy as np

    return np.asarray(image)


def _loaded(model: Model) -> LoadedModel:
    return LoadedModel(model.file.name, model.memory_bytes, model.load_seconds, model.loras.names, model.speed)


def _frugal(model: Model) -> Model:
    model.be_frugal()
    return model


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError)


def _free() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
