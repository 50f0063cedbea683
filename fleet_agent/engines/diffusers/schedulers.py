"""Schedulers by the names that people know them by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# name -> class of diffusers, and what its config gets beyond the model's own
SCHEDULERS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "ddim": ("DDIMScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
OWN = "default"
"""The model's own scheduler."""
NAMES = (*SCHEDULERS, OWN)


def make(name: str, own: Any) -> Any:
    """A fresh scheduler: `own` is the model's, whose training schedule any other takes over."""
    import diffusers

    if name == OWN:
        return type(own).from_config(own.config)
    class_name, more = SCHEDULERS[name]
    return getattr(diffusers, class_name).from_config(own.config, **more)
