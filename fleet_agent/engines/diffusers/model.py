"""One SDXL checkpoint in memory: read from a folder or one file, its LoRAs put on and taken off exactly."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleet_agent.engines.base import EngineError, LoraUse, ModelFile
from fleet_agent.engines.diffusers.options import Options

_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
CONFIGS = "configs/sdxl"
"""Below the model folder: configs and tokenizers for checkpoints of one file, where there is no network."""


@dataclass(frozen=True, slots=True)
class Device:
    """Where models run and in what."""

    name: str
    dtype: Any
    float8: bool
    compile: bool

    @property
    def is_gpu(self) -> bool:
        return not self.name.startswith("cpu")


def device_of(options: Options) -> Device:
    """The device that the options ask for. Raises EngineError where it is not there."""
    import torch

    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise EngineError("ENGINE_FAILED", f"FLEET_DIFFUSERS_DEVICE={name}: torch sees no such GPU here")
    gpu = not name.startswith("cpu")
    dtype = {"auto": torch.float16 if gpu else torch.float32}.get(options.dtype) or getattr(torch, options.dtype)
    wants = options.compile == "on" or (options.compile == "auto" and gpu)
    return Device(name, dtype, options.storage == "float8", wants)


class Model:
    """A checkpoint: `pipeline` has its parts. Raises EngineError from `read`."""

    def __init__(self, file: ModelFile, pipeline: Any, device: Device, seconds: float) -> None:
        self.file = file
        self.pipeline = pipeline
        self.load_seconds = seconds
        self._device = device
        self._loras: dict[str, tuple[str, str | None]] = {}
        self._weights: tuple[tuple[str, float], ...] = ()
        self._added = 0
        self._frugal = False
        self._compiled: Any = None
        self._map: Any = None
        self._bytes = sum(_bytes(getattr(pipeline, part)) for part in _PARTS)

    @classmethod
    def read(cls, file: ModelFile, models_folder: Path, device: Device) -> Model:
        """Reads a checkpoint into the host's memory. Raises MODEL_NOT_FOUND, OUT_OF_MEMORY, ENGINE_FAILED."""
        begun = time.perf_counter()
        pipeline = _read(file, models_folder, device)
        if device.float8:
            import torch

            pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=device.dtype)
        pipeline.unet.eval()
        return cls(file, pipeline, device, time.perf_counter() - begun)

    @property
    def memory_bytes(self) -> int:
        return self._bytes

    @property
    def loras(self) -> tuple[str, ...]:
        """Names of the LoRAs beside it, sorted."""
        return tuple(sorted(self._loras))

    @property
    def unet(self) -> Any:
        """What denoises: compiled where that is on and no LoRA is applied, since each set would be compiled anew."""
        if not self._device.compile or self._weights:
            return self.pipeline.unet
        if self._compiled is None:
            import torch

            self._compiled = torch.compile(self.pipeline.unet, mode="reduce-overhead" if self._device.is_gpu else None)
        return self._compiled

    @property
    def frugal(self) -> bool:
        """Whether it trades time for memory."""
        return self._frugal

    def be_frugal(self) -> None:
        """Decodes in tiles and attends in slices from now on: slower, in much less memory."""
        self._frugal = True
        self.pipeline.vae.enable_tiling()
        self.pipeline.unet.set_attention_slice("auto")

    @property
    def rgb(self) -> Any:
        """(channels + 1, 3): latents to colours for previews, learned from the model's own decoder once."""
        if self._map is None:
            from fleet_agent.engines.diffusers.preview import learn

            self._map = learn(self.pipeline.vae)
        return self._map

    def to_device(self) -> None:
        import torch

        for part in _PARTS:
            getattr(self.pipeline, part).to(self._device.name)
        if self._device.is_gpu:
            self.pipeline.unet.to(memory_format=torch.channels_last)
            self.pipeline.vae.to(memory_format=torch.channels_last)

    def to_host(self) -> None:
        for part in _PARTS:
            getattr(self.pipeline, part).to("cpu")
        self._compiled = None

    def have(self, uses: Sequence[LoraUse]) -> None:
        """Has the LoRAs of `uses` in memory, and no other. Raises EngineError naming the file."""
        wanted = {use.file.name: use.file for use in uses}
        gone = [
            name for name, (_, sha256) in self._loras.items() if name not in wanted or wanted[name].sha256 != sha256
        ]
        if gone:
            self._apply(())
            for name in gone:
                self.pipeline.delete_adapters(self._loras.pop(name)[0])
            if not self._loras:
                # Without any the layers are what they were before the first came, bit for bit.
                self.pipeline.unload_lora_weights()
        for name, file in sorted(wanted.items()):
            if name not in self._loras:
                self._add(name, file)

    def apply(self, uses: Sequence[LoraUse]) -> None:
        """Puts these weights in force; a weight of 0 is as if the LoRA was not there."""
        self.have(uses)
        self._apply(tuple(sorted((use.file.name, use.weight) for use in uses if use.weight)))

    def _apply(self, weights: tuple[tuple[str, float], ...]) -> None:
        if weights == self._weights and (weights or not self._loras):
            return
        if weights:
            self.pipeline.enable_lora()
            names = [self._loras[name][0] for name, _ in weights]
            self.pipeline.set_adapters(names, [weight for _, weight in weights])
        elif self._loras:
            self.pipeline.disable_lora()
        self._weights = weights

    def _add(self, name: str, file: ModelFile) -> None:
        if file.path is None:
            raise EngineError("LORA_NOT_FOUND", f"LoRA {name} has no file")
        self._added += 1
        adapter = f"lora_{self._added}"
        try:
            self.pipeline.load_lora_weights(
                str(file.path.parent), weight_name=file.path.name, adapter_name=adapter, local_files_only=True
            )
        except FileNotFoundError as error:
            raise EngineError("LORA_NOT_FOUND", f"LoRA {name} is no longer on this node", retryable=True) from error
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise EngineError("ENGINE_FAILED", f"{name} is no LoRA for {self.file.name}: {_short(error)}") from error
        self._loras[name] = (adapter, file.sha256)


def _read(file: ModelFile, models_folder: Path, device: Device) -> Any:
    from diffusers import StableDiffusionXLPipeline

    path = file.path
    if path is None or not path.exists():
        raise EngineError("MODEL_NOT_FOUND", f"model {file.name} is no longer on this node", retryable=path is not None)
    try:
        if path.is_dir():
            return StableDiffusionXLPipeline.from_pretrained(
                path, local_files_only=True, dtype=device.dtype, add_watermarker=False
            )
        config = _config(path, models_folder)
        more = {} if config is None else {"config": str(config), "local_files_only": True}
        return StableDiffusionXLPipeline.from_single_file(str(path), dtype=device.dtype, add_watermarker=False, **more)
    except MemoryError as error:
        raise EngineError("OUT_OF_MEMORY", f"no memory for {file.name}: {file.size_bytes} bytes", True) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        hint = "" if path.is_dir() else f"; without a network put SDXL's configs and tokenizers into {CONFIGS}"
        raise EngineError("ENGINE_FAILED", f"cannot read {file.name}: {_short(error)}{hint}") from error


def _config(path: Path, models_folder: Path) -> Path | None:
    """Layout for a checkpoint of one file: a folder of its name beside it, or the model folder's own."""
    own = path.with_suffix("")
    for folder in (own, models_folder / CONFIGS):
        if (folder / "model_index.json").is_file():
            return folder
    return None


def _bytes(part: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*part.parameters(), *part.buffers()))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
