"""One SDXL checkpoint in memory: its parts, where they are, its LoRAs, and how it denoises."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from fleet_agent.engines.base import ModelFile
from fleet_agent.engines.diffusers.device import Device
from fleet_agent.engines.diffusers.loras import Loras
from fleet_agent.engines.diffusers.reading import PARTS, read

Shape = tuple[int, int, int, int]
"""Rows (twice the pictures where prompts are guided), height and width of the latents, tokens of the prompts."""


class Model:
    """A checkpoint: `pipeline` has its parts. `speed` is pixels times steps a second, None until it was measured."""

    def __init__(self, file: ModelFile, pipeline: Any, device: Device, seconds: float) -> None:
        self.file = file
        self.pipeline = pipeline
        self.load_seconds = seconds
        self.speed: float | None = None
        self.loras = Loras(file.name, pipeline, device.dtype if device.float8 else None)
        self._device = device
        self._frugal = False
        self._compiled: Any = None
        self._ready: set[Shape] = set()
        self._map: Any = None
        self._bytes = sum(_bytes(getattr(pipeline, part)) for part in PARTS)

    @classmethod
    def read(cls, file: ModelFile, models_folder: Path, device: Device) -> Self:
        """Reads a checkpoint into the host's memory. Raises MODEL_NOT_FOUND, OUT_OF_MEMORY, ENGINE_FAILED."""
        begun = time.perf_counter()
        pipeline = read(file, models_folder, device.dtype)
        if device.float8:
            import torch

            pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=device.dtype)
        pipeline.unet.eval()
        return cls(file, pipeline, device, time.perf_counter() - begun)

    @property
    def memory_bytes(self) -> int:
        return self._bytes

    @property
    def device(self) -> Device:
        """Where it runs when it is not on the host."""
        return self._device

    # How it denoises.

    def unet(self, shape: Shape) -> Any:
        """What denoises latents of a shape: compiled where it was made ready for that shape and no LoRA is beside it.

        To compile takes a minute, which no job is to wait for, and each set of LoRAs would take another.
        """
        if self._compiled is not None and shape in self._ready and not self.loras.names:
            return self._compiled
        return self.pipeline.unet

    def make_ready(self, shape: Shape) -> None:
        """From now on latents of this shape are denoised by a compiled UNet."""
        if self._compiled is None:
            import torch

            # With CUDA graphs: on fast GPUs the launches of a small batch take longer than its work.
            mode = "reduce-overhead" if self._device.is_gpu else None
            self._compiled = torch.compile(self.pipeline.unet, mode=mode, dynamic=False)
        self._ready.add(shape)

    def not_ready(self, shape: Shape) -> None:
        """Takes that back."""
        self._ready.discard(shape)

    @property
    def rgb(self) -> Any:
        """(channels + 1, 3): latents to colours for previews, learned from the model's own decoder once."""
        if self._map is None:
            from fleet_agent.engines.diffusers.preview import learn

            with self.at_work("vae"):
                self._map = learn(self.pipeline.vae)
        return self._map

    # Where it is.

    def to_device(self) -> None:
        """Moves it onto the device; where it is frugal, of its parts only the one that works longest."""
        for part in PARTS:
            if part == "unet" or not self._frugal:
                self._move(part, self._device.name)

    def to_host(self) -> None:
        """Moves it off; what was compiled for its place on the device is forgotten."""
        self._compiled = None
        self._ready.clear()
        for part in PARTS:
            self._move(part, "cpu")

    def _move(self, part: str, where: str) -> None:
        import torch

        module = getattr(self.pipeline, part)
        module.to(where)
        if where == self._device.name and self._device.is_gpu and part in ("unet", "vae"):
            module.to(memory_format=torch.channels_last)

    @property
    def frugal(self) -> bool:
        """Whether it trades time for memory."""
        return self._frugal

    def be_frugal(self) -> None:
        """From now on it decodes in tiles, and parts other than the UNet are on the device only while they work."""
        self._frugal = True
        self.pipeline.vae.enable_tiling()
        self._compiled = None
        self._ready.clear()
        for part in PARTS:
            if part != "unet":
                self._move(part, "cpu")

    @contextmanager
    def at_work(self, *parts: str) -> Iterator[None]:
        """These parts are on the device inside."""
        if not self._frugal:
            yield
            return
        try:
            for part in parts:
                self._move(part, self._device.name)
            yield
        finally:
            for part in parts:
                self._move(part, "cpu")


def _bytes(part: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*part.parameters(), *part.buffers()))
