"""Latents to pictures and back, in the precision that the decoder needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def precise(vae: Any) -> Iterator[Any]:
    """The dtype to give it; in float32 where it would overflow in float16, as SDXL's own does."""
    import torch

    own = next(vae.parameters()).dtype
    upcast = vae.config.force_upcast and own == torch.float16
    if upcast:
        vae.to(torch.float32)
    try:
        yield torch.float32 if upcast else own
    finally:
        if upcast:
            vae.to(torch.float16)


def decoded(vae: Any, latent: Any) -> Any:
    """One latent (channels, height, width), not scaled, as a picture (height, width, 3) of uint8 on the host."""
    import torch

    with torch.no_grad(), precise(vae) as dtype:
        made = vae.decode((latent[None] / vae.config.scaling_factor).to(dtype), return_dict=False)[0][0]
        return (made.float() / 2 + 0.5).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()


def encoded(picture: Any, vae: Any) -> Any:
    """A picture (height, width, 3) of uint8 as a latent (1, channels, height, width), not scaled."""
    import torch

    device = next(vae.parameters()).device
    pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].to(device, torch.float32) / 127.5 - 1
    with torch.no_grad(), precise(vae) as dtype:
        mean = vae.encode(pixels.to(dtype)).latent_dist.mean
        return mean.float() * vae.config.scaling_factor
