"""Node classes, in the words of /object_info. What the recording has is taken from it, the rest is in its form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SAMPLES = Path(__file__).parent / "samples"
Config = dict[str, Any]


def combo(*words: str, **options: Any) -> list[Any]:
    """An input that is one of these words."""
    return [list(words), options] if options else [list(words)]


def node_class(
    name: str,
    required: Mapping[str, list[Any]] | None = None,
    optional: Mapping[str, list[Any]] | None = None,
    output: Sequence[str] = (),
    *,
    output_node: bool = False,
    hidden: Mapping[str, str] | None = None,
    module: str = "nodes",
    category: str = "image",
) -> Config:
    """One class as /object_info shows it."""
    parts: dict[str, Any] = {"required": dict(required or {})}
    if optional:
        parts["optional"] = dict(optional)
    if hidden:
        parts["hidden"] = dict(hidden)
    return {
        "input": parts,
        "input_order": {part: list(inputs) for part, inputs in parts.items()},
        "output": list(output),
        "output_is_list": [False] * len(output),
        "output_name": list(output),
        "name": name,
        "display_name": name,
        "description": "",
        "python_module": module,
        "category": category,
        "output_node": output_node,
    }


def sample(name: str) -> Any:
    """A recorded exchange or conversation."""
    return json.loads((SAMPLES / f"{name}.json").read_text())


def _recorded(name: str) -> Config:
    body: dict[str, Config] = sample(f"object_info_{name}")["body"]
    return body[name]


def _int(default: int, low: int, high: int, **more: Any) -> list[Any]:
    return ["INT", {"default": default, "min": low, "max": high, **more}]


def _float(default: float, low: float, high: float) -> list[Any]:
    return ["FLOAT", {"default": default, "min": low, "max": high, "step": 0.01}]


_SIZE = 16384
_UPSCALE = combo("nearest-exact", "bilinear", "area", "bicubic", "lanczos")
_HIDDEN = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}
_STRENGTH = _float(1.0, -100.0, 100.0)


def _standard() -> dict[str, Config]:
    found = [_recorded(name) for name in ("CheckpointLoaderSimple", "EmptyImage", "KSampler", "SaveImage")]
    found += [
        node_class(
            "ImageScale",
            {
                "image": ["IMAGE"],
                "upscale_method": _UPSCALE,
                "width": _int(512, 0, _SIZE, step=1),
                "height": _int(512, 0, _SIZE, step=1),
                "crop": combo("disabled", "center"),
            },
            output=["IMAGE"],
        ),
        node_class(
            "ImageScaleBy",
            {"image": ["IMAGE"], "upscale_method": _UPSCALE, "scale_by": _float(1.0, 0.01, 8.0)},
            output=["IMAGE"],
        ),
        node_class(
            "ImageBlur",
            # The recording's error names this very config.
            {"image": ["IMAGE"], "blur_radius": _int(1, 1, 31, step=1), "sigma": _float(1.0, 0.1, 10.0)},
            output=["IMAGE"],
        ),
        node_class("ImageInvert", {"image": ["IMAGE"]}, output=["IMAGE"]),
        node_class(
            "CLIPTextEncode", {"text": ["STRING", {"multiline": True}], "clip": ["CLIP"]}, output=["CONDITIONING"]
        ),
        node_class(
            "EmptyLatentImage",
            {
                "width": _int(512, 16, _SIZE, step=8),
                "height": _int(512, 16, _SIZE, step=8),
                "batch_size": _int(1, 1, 4096),
            },
            output=["LATENT"],
        ),
        node_class(
            "LatentFromBatch",
            {"samples": ["LATENT"], "batch_index": _int(0, 0, 63), "length": _int(1, 1, 64)},
            output=["LATENT"],
        ),
        node_class(
            "VAEDecode",
            {
                "samples": ["LATENT", {"tooltip": "The latent to be decoded."}],
                "vae": ["VAE", {"tooltip": "The VAE model used for decoding the latent."}],
            },
            output=["IMAGE"],
        ),
        node_class("VAEEncode", {"pixels": ["IMAGE"], "vae": ["VAE"]}, output=["LATENT"]),
        node_class(
            "VAEEncodeForInpaint",
            {"pixels": ["IMAGE"], "vae": ["VAE"], "mask": ["MASK"], "grow_mask_by": _int(6, 0, 64, step=1)},
            output=["LATENT"],
        ),
        node_class("SetLatentNoiseMask", {"samples": ["LATENT"], "mask": ["MASK"]}, output=["LATENT"]),
        node_class("RepeatLatentBatch", {"samples": ["LATENT"], "amount": _int(1, 1, 64)}, output=["LATENT"]),
        node_class("LoadImage", {"image": [[], {"image_upload": True}]}, output=["IMAGE", "MASK"]),
        node_class(
            "LoadImageMask",
            {"image": [[], {"image_upload": True}], "channel": combo("alpha", "red", "green", "blue")},
            output=["MASK"],
        ),
        node_class(
            "LoraLoader",
            {
                "model": ["MODEL"],
                "clip": ["CLIP"],
                "lora_name": [[]],
                "strength_model": _STRENGTH,
                "strength_clip": _STRENGTH,
            },
            output=["MODEL", "CLIP"],
        ),
        node_class("PreviewImage", {"images": ["IMAGE"]}, output_node=True, hidden=_HIDDEN),
        node_class(
            "SaveAnimatedWEBP",
            {
                "images": ["IMAGE"],
                "filename_prefix": ["STRING", {"default": "ComfyUI"}],
                "fps": _float(6.0, 0.01, 1000.0),
                "lossless": ["BOOLEAN", {"default": True}],
                "quality": _int(80, 0, 100),
                "method": combo("default", "fastest", "slowest"),
            },
            output_node=True,
            hidden=_HIDDEN,
            module="comfy_extras.nodes_images",
        ),
        # The node with which progress, failures and interruptions were recorded.
        node_class(
            "FleetProgress",
            {
                "width": _int(256, 8, 4096),
                "height": _int(256, 8, 4096),
                "steps": _int(4, 1, 1000),
                "seed": _int(0, 0, 2**64 - 1),
                "step_ms": _int(50, 0, 10000),
                "fail_at": _int(0, 0, 1000),
            },
            output=["IMAGE"],
            module="custom_nodes.fleet_progress",
        ),
    ]
    return {config["name"]: config for config in found}


STANDARD: Mapping[str, Config] = _standard()
"""Classes of every node, unless its Script says otherwise."""


def _animatediff() -> dict[str, Config]:
    module = "custom_nodes.ComfyUI-AnimateDiff-Evolved"
    found = [
        node_class(
            "ADE_StandardStaticContextOptions",
            {"context_length": _int(16, 1, 128), "context_overlap": _int(4, 0, 128)},
            output=["CONTEXT_OPTIONS"],
            module=module,
        ),
        node_class(
            "ADE_AnimateDiffLoaderGen1",
            {
                "model": ["MODEL"],
                "model_name": combo("mm_sd_v15_v2.ckpt"),
                "beta_schedule": combo("autoselect", "use existing", "sqrt_linear (AnimateDiff)"),
            },
            {"context_options": ["CONTEXT_OPTIONS"]},
            output=["MODEL"],
            module=module,
        ),
    ]
    return {config["name"]: config for config in found}


ANIMATEDIFF: Mapping[str, Config] = _animatediff()
"""What the AnimateDiff-Evolved extension brings."""

VIDEO_HELPER: Mapping[str, Config] = {
    "VHS_VideoCombine": node_class(
        "VHS_VideoCombine",
        {
            "images": ["IMAGE"],
            "frame_rate": _float(8.0, 1.0, 1000.0),
            "loop_count": _int(0, 0, 100, step=1),
            "filename_prefix": ["STRING", {"default": "AnimateDiff"}],
            "format": combo("image/gif", "image/webp", "video/h264-mp4", "video/webm"),
            "pingpong": ["BOOLEAN", {"default": False}],
            "save_output": ["BOOLEAN", {"default": True}],
        },
        output=["VHS_FILENAMES"],
        output_node=True,
        module="custom_nodes.ComfyUI-VideoHelperSuite",
    )
}
"""What the VideoHelperSuite extension brings."""
