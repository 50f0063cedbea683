"""Works for the `sketch` engine: checks fields, loads its small models, paints, and writes a PNG saying how."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fleet_agent.engines import png
from fleet_agent.engines.base import (
    EngineError,
    EngineOutput,
    EngineResult,
    LoadedModel,
    LoraUse,
    ModelFile,
    Reporter,
    Task,
)
from fleet_agent.engines.image import preview_bytes, request_of, texts_of
from fleet_agent.engines.sketch.engine import DEFAULT_MODEL, NAME, VERSION
from fleet_agent.engines.sketch.painter import SCHEDULERS, paint
from fleet_agent.engines.sketch.style import checked, combine, default_tensors
from fleet_agent.engines.start import Start, lay_over, resized, start_of

Tensors = dict[str, npt.NDArray[np.float32]]


@dataclass
class _Loaded:
    """A file in memory: the tensors that are used, and all bytes that the file holds."""

    name: str
    sha256: str | None
    style: Tensors
    everything: Mapping[str, npt.NDArray[np.generic]]
    seconds: float
    loras: dict[str, _Loaded] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        own = sum(tensor.nbytes for tensor in self.everything.values()) or sum(t.nbytes for t in self.style.values())
        return own + sum(lora.bytes for lora in self.loras.values())


class Studio:
    """The models in memory, and the painting with them."""

    def __init__(self) -> None:
        self._model: _Loaded | None = None

    def load(self, model: ModelFile | None, loras: tuple[LoraUse, ...] = ()) -> LoadedModel:
        """Read every tensor of the files, as a real engine must; another model in memory is freed first."""
        name = model.name if model else DEFAULT_MODEL
        sha256 = model.sha256 if model else None
        if self._model is None or (self._model.name, self._model.sha256) != (name, sha256):
            self._model = None
            self._model = _read(model)
        loaded = self._model
        wanted = {use.file.name: use.file for use in loras}
        loaded.loras = {n: lora for n, lora in loaded.loras.items() if n in wanted and lora.sha256 == wanted[n].sha256}
        for lora_name, file in sorted(wanted.items()):
            if lora_name not in loaded.loras:
                loaded.loras[lora_name] = _read(file)
        return self.loaded()[0]

    def unload(self, model: str) -> None:
        if self._model is not None and self._model.name == model:
            self._model = None

    def loaded(self) -> list[LoadedModel]:
        model = self._model
        if model is None:
            return []
        return [LoadedModel(model.name, model.bytes, model.seconds, tuple(sorted(model.loras)))]

    def run(self, task: Task, report: Reporter) -> EngineResult:
        request = request_of(task, NAME, SCHEDULERS, default="euler")
        start = start_of(task, request.width, request.height)
        self.load(task.model, task.loras)
        assert self._model is not None
        # By name, so that the order in which the LoRAs were named cannot change a pixel.
        uses = sorted(task.loras, key=lambda use: (use.file.name, use.weight))
        style = combine(self._model.style, [(self._model.loras[u.file.name].style, u.weight) for u in uses])
        picture = paint(request, style, _Relay(report, request.steps, task.previews, start))
        if start is not None:
            picture = lay_over(start, picture)
        path = task.output_folder / f"{task.job_id}.png"
        report.check()
        try:
            png.write(path, picture, texts_of(task, request, self._model.name, engine=NAME, version=VERSION))
        except OSError as error:
            path.unlink(missing_ok=True)
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = "DISK_FULL" if full else "ENGINE_FAILED"
            raise EngineError(reason, f"cannot write the picture: {error.strerror}", retryable=True) from error
        report.progress(request.steps, request.steps)
        output = EngineOutput(path, "image/png", request.width, request.height, seed=request.seed)
        return EngineResult((output,))


class _Relay:
    """Hands the painter's steps to the slot; the last step is reported once the file is written."""

    def __init__(self, report: Reporter, steps: int, previews: bool, start: Start | None = None) -> None:
        self._report, self._steps, self._previews, self._start = report, steps, previews, start

    def check(self) -> None:
        self._report.check()

    def step(self, done: int, picture: Callable[[], npt.NDArray[np.uint8]] | None) -> None:
        if done < self._steps:
            self._report.progress(done, self._steps)
            if picture is not None and self._previews:
                shown = picture()
                if self._start is not None:
                    shown = lay_over(resized(self._start, shown.shape[1], shown.shape[0]), shown)
                self._report.preview("image/jpeg", preview_bytes(shown))


def _read(model: ModelFile | None) -> _Loaded:
    if model is None or model.path is None:
        name = model.name if model else DEFAULT_MODEL
        if name != DEFAULT_MODEL or (model and model.kind != "checkpoint"):
            raise EngineError("MODEL_NOT_FOUND", f"model {name} is not built into sketch and has no file")
        return _Loaded(name, model.sha256 if model else None, default_tensors(), {}, 0.0)
    start = time.perf_counter()
    tensors = _load_file(model, model.path)
    prefix = "lora." if model.kind == "lora" else ""
    floats: Tensors = {n: t.astype(np.float32, copy=False) for n, t in tensors.items() if t.dtype == np.float32}
    if prefix and not any(name.startswith(prefix) for name in floats):
        detail = f"{model.name} is no LoRA for sketch; make one with `fleet sketch-model --lora`"
        raise EngineError("ENGINE_FAILED", detail)
    style = checked(floats, model.name, prefix=prefix)
    return _Loaded(model.name, model.sha256, style, tensors, time.perf_counter() - start)


def _load_file(model: ModelFile, path: Path) -> Mapping[str, npt.NDArray[np.generic]]:
    missing = "LORA_NOT_FOUND" if model.kind == "lora" else "MODEL_NOT_FOUND"
    try:
        return dict(load_file(path))
    except FileNotFoundError as error:
        raise EngineError(missing, f"{model.kind} {model.name} is no longer on this node", retryable=True) from error
    except MemoryError as error:
        raise EngineError("OUT_OF_MEMORY", f"no memory for {model.name}: {model.size_bytes} bytes", True) from error
    except (OSError, SafetensorError, KeyError) as error:
        raise EngineError("ENGINE_FAILED", f"cannot read {model.name}: {error}") from error
