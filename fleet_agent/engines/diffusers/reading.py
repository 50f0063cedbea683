"""Checkpoints from the disk: a folder in diffusers' layout, or one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fleet_agent.engines.base import EngineError, ModelFile

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
CONFIGS = "configs/sdxl"
"""Below the model folder: configs and tokenizers for checkpoints of one file, where there is no network."""


def read(file: ModelFile, models_folder: Path, dtype: Any) -> Any:
    """The pipeline, on the host. Raises MODEL_NOT_FOUND, OUT_OF_MEMORY, ENGINE_FAILED."""
    path = file.path
    if path is None or not path.exists():
        raise EngineError("MODEL_NOT_FOUND", f"model {file.name} is no longer on this node", retryable=path is not None)
    try:
        pipeline = _pipeline(path, models_folder, dtype)
    except MemoryError as error:
        raise EngineError("OUT_OF_MEMORY", f"no memory for {file.name}: {file.size_bytes} bytes", True) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        hint = "" if path.is_dir() else f"; without a network put SDXL's configs and tokenizers into {CONFIGS}"
        raise EngineError("ENGINE_FAILED", f"cannot read {file.name}: {short(error)}{hint}") from error
    missing = [part for part in PARTS if getattr(pipeline, part, None) is None]
    if missing:
        raise EngineError("ENGINE_FAILED", f"{file.name} has no {missing[0]}: it is no base model of SDXL")
    channels = pipeline.unet.config.in_channels
    if channels != pipeline.vae.config.latent_channels:
        raise EngineError("ENGINE_FAILED", f"{file.name} takes {channels} channels: it is no text-to-image model")
    return pipeline


def short(error: Exception) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _pipeline(path: Path, models_folder: Path, dtype: Any) -> Any:
    from diffusers import StableDiffusionXLPipeline

    if path.is_dir():
        # Never a pickle, which can hold a program.
        return StableDiffusionXLPipeline.from_pretrained(
            path,
            local_files_only=True,
            dtype=dtype,
            variant=_variant(path),
            use_safetensors=True,
            add_watermarker=False,
        )
    config = _config(path, models_folder)
    more = {} if config is None else {"config": str(config), "local_files_only": True}
    return StableDiffusionXLPipeline.from_single_file(str(path), dtype=dtype, add_watermarker=False, **more)


def _variant(path: Path) -> str | None:
    """`fp16` where the weights are named so, as in many a download, and not otherwise too."""
    unet = path / "unet"
    names = {file.name for file in unet.glob("*.safetensors")}
    return "fp16" if names and all(".fp16" in name for name in names) else None


def _config(path: Path, models_folder: Path) -> Path | None:
    """Layout for a checkpoint of one file: a folder of its name beside it, or the model folder's own."""
    own = path.with_suffix("")
    for folder in (own, models_folder / CONFIGS):
        if (folder / "model_index.json").is_file():
            return folder
    return None
