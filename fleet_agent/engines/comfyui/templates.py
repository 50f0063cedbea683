"""Graphs for jobs that bring none: text to image, image to image, inpainting, clips by AnimateDiff."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fleet_agent.engines.base import EngineError, LoraUse

Graph = dict[str, dict[str, Any]]
Link = list[Any]
MOTION_LOADER = "ADE_AnimateDiffLoaderGen1"
MOTION_CONTEXT = "ADE_StandardStaticContextOptions"
VIDEO_COMBINE = "VHS_VideoCombine"
_LONGEST_REPEAT = 64
_CONTEXT = 16


@dataclass(frozen=True, slots=True)
class Sampling:
    """Names of samplers and of schedules (of noise) that a ComfyUI has."""

    samplers: Sequence[str]
    schedules: Sequence[str]

    def of(self, scheduler: str | None) -> tuple[str, str]:
        """Sampler and schedule for our one name: `dpmpp_2m_karras` is both. Raises EngineError for an unknown one."""
        if scheduler is None:
            return "euler", "normal"
        name = scheduler.lower()
        if name in self.samplers:
            return name, "normal"
        for schedule in self.schedules:
            if name.endswith(f"_{schedule}") and name.removesuffix(f"_{schedule}") in self.samplers:
                return name.removesuffix(f"_{schedule}"), schedule
        known = ", ".join(self.samplers)
        raise EngineError("INVALID_FIELD", f"scheduler: must be one of {known}, alone or with _karras and the like")


@dataclass(frozen=True, slots=True)
class Still:
    """What a picture is made of. `init` and `mask` are names of uploaded files."""

    checkpoint: str
    fields: Mapping[str, Any]
    seed: int
    loras: Sequence[LoraUse]
    prefix: str
    init: str | None = None
    mask: str | None = None


@dataclass(frozen=True, slots=True)
class Motion:
    """What makes a clip of it. `combine`: the node has the video nodes that write mp4."""

    module: str
    frames: int
    fps: float
    combine: bool


class _Builder:
    def __init__(self) -> None:
        self.graph: Graph = {}

    def add(self, kind: str, **inputs: Any) -> str:
        node_id = str(len(self.graph) + 1)
        self.graph[node_id] = {"class_type": kind, "inputs": inputs}
        return node_id


def image_graph(still: Still, sampling: Sampling) -> Graph:
    """The graph of one picture, saved under the prefix."""
    build = _Builder()
    pictures = _sampled(build, still, sampling, None)
    build.add("SaveImage", images=pictures, filename_prefix=still.prefix)
    return build.graph


def clip_graph(still: Still, sampling: Sampling, motion: Motion) -> Graph:
    """The graph of one clip: mp4 where the node can write it, else an animated WebP."""
    build = _Builder()
    pictures = _sampled(build, still, sampling, motion)
    if motion.combine:
        build.add(
            VIDEO_COMBINE,
            images=pictures,
            frame_rate=motion.fps,
            loop_count=0,
            filename_prefix=still.prefix,
            format="video/h264-mp4",
            pix_fmt="yuv420p",
            crf=19,
            save_metadata=True,
            pingpong=False,
            save_output=True,
        )
    else:
        build.add(
            "SaveAnimatedWEBP",
            images=pictures,
            filename_prefix=still.prefix,
            fps=motion.fps,
            lossless=False,
            quality=85,
            method="default",
        )
    return build.graph


def _sampled(build: _Builder, still: Still, sampling: Sampling, motion: Motion | None) -> Link:
    """The pictures, decoded."""
    sampler, schedule = sampling.of(still.fields.get("scheduler"))
    loader = build.add("CheckpointLoaderSimple", ckpt_name=still.checkpoint)
    model: Link = [loader, 0]
    clip: Link = [loader, 1]
    vae: Link = [loader, 2]
    for use in still.loras:
        strength = {"strength_model": use.weight, "strength_clip": use.weight}
        lora = build.add("LoraLoader", model=model, clip=clip, lora_name=use.file.name, **strength)
        model, clip = [lora, 0], [lora, 1]
    if motion is not None:
        options = build.add(MOTION_CONTEXT, context_length=_CONTEXT, context_overlap=4)
        loader_inputs = {"model_name": motion.module, "beta_schedule": "autoselect", "context_options": [options, 0]}
        model = [build.add(MOTION_LOADER, model=model, **loader_inputs), 0]
    positive = build.add("CLIPTextEncode", text=still.fields["prompt"], clip=clip)
    negative = build.add("CLIPTextEncode", text=still.fields.get("negative_prompt", ""), clip=clip)
    latent, denoise = _latent(build, still, vae, 1 if motion is None else motion.frames)
    samples = build.add(
        "KSampler",
        model=model,
        seed=still.seed,
        steps=int(still.fields["steps"]),
        cfg=float(still.fields["guidance_scale"]),
        sampler_name=sampler,
        scheduler=schedule,
        positive=[positive, 0],
        negative=[negative, 0],
        latent_image=latent,
        denoise=denoise,
    )
    return [build.add("VAEDecode", samples=[samples, 0], vae=vae), 0]


def _latent(build: _Builder, still: Still, vae: Link, count: int) -> tuple[Link, float]:
    """What the sampler begins with, and how much of it it may change."""
    width, height = int(still.fields["width"]), int(still.fields["height"])
    if still.init is None:
        return [build.add("EmptyLatentImage", width=width, height=height, batch_size=count), 0], 1.0
    if count > _LONGEST_REPEAT:
        raise EngineError("INVALID_FIELD", f"frames: must be at most {_LONGEST_REPEAT} with init_image")
    loaded = build.add("LoadImage", image=still.init)
    scaled = build.add(
        "ImageScale", image=[loaded, 0], upscale_method="lanczos", width=width, height=height, crop="center"
    )
    latent: Link = [build.add("VAEEncode", pixels=[scaled, 0], vae=vae), 0]
    if still.mask is not None:
        # White is painted: of a grey mask any channel will do.
        mask = build.add("LoadImageMask", image=still.mask, channel="red")
        latent = [build.add("SetLatentNoiseMask", samples=latent, mask=[mask, 0]), 0]
    if count > 1:
        latent = [build.add("RepeatLatentBatch", samples=latent, amount=count), 0]
    return latent, float(still.fields.get("strength", 0.75))
