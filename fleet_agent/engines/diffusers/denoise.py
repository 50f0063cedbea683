"""From noise to latents: one loop for a batch of tasks that share shape, model, steps and scheduler.

Everything of a task is its own row: prompt, guidance, noise. A row computes as it would alone, so tasks in a batch
cannot be told from tasks one by one but for rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fleet_agent.engines.diffusers.model import Model
from fleet_agent.engines.diffusers.prompts import Embedded, chunks_of, embed
from fleet_agent.engines.diffusers.schedulers import make
from fleet_agent.engines.diffusers.vae import encoded
from fleet_agent.engines.image import ImageRequest
from fleet_agent.engines.start import Start

SCALE = 8
"""Pixels of a latent's side."""


@dataclass(frozen=True, slots=True)
class Row:
    """One picture of a batch."""

    request: ImageRequest
    start: Start | None


@dataclass(frozen=True, slots=True)
class Step:
    """`done` steps of `of`; `latents` of all rows, not scaled."""

    done: int
    of: int
    latents: Any


def rows_chunks(model: Model, request: ImageRequest) -> int:
    """How many chunks the longer of both prompts takes: rows of one batch have as many."""
    prompts = (request.prompt, request.negative_prompt)
    return max(chunks_of(model.pipeline, text) for text in prompts)


def steps(model: Model, rows: Sequence[Row]) -> Iterator[Step]:
    """Denoises all rows, a step for each next(); at least one, also where nothing is to be done.

    A step is told when the device has done it, while it is at work on the next.
    """
    import torch

    device, request = model.device.name, rows[0].request
    with torch.no_grad():
        guided = any(row.request.guidance_scale > 1 for row in rows)
        with model.at_work("text_encoder", "text_encoder_2"):
            conditions = _conditions(model, rows, guided)
        scheduler = make(request.scheduler, model.pipeline.scheduler)
        scheduler.set_timesteps(request.steps, device=device)
        with model.at_work("vae"):
            begun = _Begun.of(rows, scheduler, model.pipeline.vae, device)
    states = conditions["encoder_hidden_states"]
    unet = model.unet((len(states), request.height // SCALE, request.width // SCALE, states.shape[1]))
    layout = torch.channels_last if model.device.is_gpu else torch.contiguous_format
    guidance = torch.tensor([row.request.guidance_scale for row in rows], device=device).view(-1, 1, 1, 1)
    more = {"generator": begun.generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    latents, count = begun.latents, len(begun.timesteps)
    if not count:
        yield Step(1, 1, latents)
    under_way: tuple[Step, Any] | None = None
    for index, timestep in enumerate(begun.timesteps):
        # Not around the yield: whoever reads the steps is not to be switched to it.
        with torch.no_grad():
            doubled = torch.cat([latents, latents]) if guided else latents
            scaled = scheduler.scale_model_input(doubled, timestep).to(states.dtype).contiguous(memory_format=layout)
            if unet is not model.pipeline.unet:
                # What a CUDA graph gave last is overwritten by its next run: nobody has it any more.
                torch.compiler.cudagraph_mark_step_begin()
            # Schedulers count in whole numbers or others, which to a compiled UNet would be two kinds of input.
            noise = unet(scaled, timestep.to(torch.float32), return_dict=False, **conditions)[0]
            noise = noise.to(torch.float32, copy=True)
            if guided:
                without, with_prompt = noise.chunk(2)
                noise = without + guidance * (with_prompt - without)
            latents = scheduler.step(noise, timestep, latents, return_dict=False, **more)[0]
            latents = begun.masked(latents, index)
        step, end = Step(index + 1, count, latents), mark(device)
        if end is None:
            yield step
            continue
        if under_way is not None:
            yield _done(*under_way)
        under_way = step, end
    if under_way is not None:
        yield _done(*under_way)


def _done(step: Step, end: Any) -> Step:
    end.synchronize()
    return step


def mark(device: str) -> Any:
    """A mark behind the work that the device has been given by now, to wait for; None where work is done at once."""
    import torch

    if not device.startswith("cuda"):
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def _conditions(model: Model, rows: Sequence[Row], guided: bool) -> dict[str, Any]:
    import torch

    chunks = rows_chunks(model, rows[0].request)
    known: dict[str, Embedded] = {}

    def embedded(text: str) -> Embedded:
        if text not in known:
            known[text] = embed(model.pipeline, text, chunks)
        return known[text]

    parts = [embedded(row.request.prompt) for row in rows]
    if guided:
        parts = [embedded(row.request.negative_prompt) for row in rows] + parts
    states = torch.cat([part.states for part in parts])
    pooled = torch.cat([part.pooled for part in parts])
    request = rows[0].request
    # Size, crop and target of SDXL's training: a picture of just this size, not cropped.
    sizes = [request.height, request.width, 0, 0, request.height, request.width]
    times = torch.tensor([sizes] * len(parts), dtype=states.dtype, device=states.device)
    return {"encoder_hidden_states": states, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": times}}


@dataclass(frozen=True, slots=True)
class _Begun:
    """Where the loop begins: noise, or a picture with as much noise as its strength asks for."""

    latents: Any
    timesteps: Any
    generators: list[Any]
    scheduler: Any
    noise: Any
    picture: Any
    mask: Any

    @classmethod
    def of(cls, rows: Sequence[Row], scheduler: Any, vae: Any, device: str) -> _Begun:
        import torch

        request = rows[0].request
        shape = (1, vae.config.latent_channels, request.height // SCALE, request.width // SCALE)
        # On the host, so that a seed gives the same noise on every device.
        generators = [torch.Generator("cpu").manual_seed(row.request.seed) for row in rows]
        noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(device)
        starts = [row.start for row in rows]
        if starts[0] is None:
            return cls(
                noise * scheduler.init_noise_sigma, scheduler.timesteps, generators, scheduler, noise, None, None
            )
        picture = torch.cat([encoded(start.picture, vae) for start in starts if start is not None]).float()
        # Schedulers of a higher order take a step in as many parts; none begins in the middle of one.
        skipped = (request.steps - round(request.steps * starts[0].strength)) * getattr(scheduler, "order", 1)
        timesteps = scheduler.timesteps[skipped:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skipped)
        latents = scheduler.add_noise(picture, noise, timesteps[:1].repeat(len(rows))) if len(timesteps) else picture
        masks = [_mask(start, device) for start in starts if start is not None]
        mask = None if masks[0] is None else torch.cat(masks)
        return cls(latents, timesteps, generators, scheduler, noise, picture, mask)

    def masked(self, latents: Any, index: int) -> Any:
        """What is not to be painted is put back, with the noise that the next step expects."""
        if self.mask is None:
            return latents
        kept = self.picture
        if index + 1 < len(self.timesteps):
            kept = self.scheduler.add_noise(kept, self.noise, self.timesteps[index + 1].repeat(len(kept)))
        return kept + (latents - kept) * self.mask


def _mask(start: Start, device: str) -> Any:
    import torch

    if start.mask is None:
        return None
    whole = torch.from_numpy(start.mask)[None, None]
    return torch.nn.functional.interpolate(whole, scale_factor=1 / SCALE, mode="area").to(device)
