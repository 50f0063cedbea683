"""Pictures in the making without another model: a linear map from latents to colours."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_SIDE = 16
_SHOTS = 12
_SEED = 20_231_107


def learn(vae: Any) -> Any:
    """(channels + 1, 3) by least squares from what the decoder makes of smooth random latents; the last row is a bias.

    A colour of the map is for a latent that is not scaled, as the denoiser has it; 0 to 1.
    """
    import torch

    from fleet_agent.engines.diffusers.vae import precise

    channels = vae.config.latent_channels
    generator = torch.Generator("cpu").manual_seed(_SEED)
    small = torch.randn((_SHOTS, channels, 4, 4), generator=generator)
    latents = torch.nn.functional.interpolate(small, size=(_SIDE, _SIDE), mode="bilinear")
    first = next(vae.parameters())
    with torch.no_grad(), precise(vae) as dtype:
        pictures = vae.decode((latents / vae.config.scaling_factor).to(first.device, dtype), return_dict=False)[0]
    colours = torch.nn.functional.interpolate(pictures.float().cpu(), size=(_SIDE, _SIDE), mode="area")
    left = latents.permute(0, 2, 3, 1).reshape(-1, channels)
    left = torch.cat([left, torch.ones(len(left), 1)], dim=1)
    right = colours.permute(0, 2, 3, 1).reshape(-1, 3) / 2 + 0.5
    return torch.linalg.lstsq(left, right).solution


def picture(latents: Any, rgb: Any) -> npt.NDArray[np.uint8]:
    """One latent (channels, height, width) as a picture of its own size in pixels."""
    flat = latents.detach().float().cpu().permute(1, 2, 0)
    colours = flat @ rgb[:-1] + rgb[-1]
    pixels: npt.NDArray[np.uint8] = np.rint(colours.clamp(0, 1).numpy() * 255).astype(np.uint8)
    return pixels
