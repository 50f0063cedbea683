"""Where models run, in what, and with how much memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fleet_agent.engines.base import EngineError
from fleet_agent.engines.diffusers.options import Options

_SHARE = 0.9
"""Of a GPU's memory for models; what a picture takes besides makes room for itself."""


@dataclass(frozen=True, slots=True)
class Device:
    """A processor or GPU, as torch calls it; `sizes` of pictures are those that a model is made ready for."""

    name: str
    dtype: Any
    float8: bool
    compile: bool
    sizes: tuple[tuple[int, int], ...]
    memory_bytes: int
    host_memory_bytes: int

    @property
    def is_gpu(self) -> bool:
        return not self.name.startswith("cpu")

    def free_bytes(self) -> int | None:
        """What a model could have now, other programs and engines counted; None where only the budget counts."""
        import torch

        if not self.name.startswith("cuda"):
            return None
        free, _ = torch.cuda.mem_get_info(self.name)
        kept = torch.cuda.memory_reserved(self.name) - torch.cuda.memory_allocated(self.name)
        return int(free) + int(kept)


def device_of(options: Options, slots: Mapping[str, str] | None = None) -> Device:
    """The device that the options ask for; `slots` says which slot of how many this is. Raises EngineError.

    With `auto` each slot takes the next GPU; slots that must share one share its memory.
    """
    import psutil
    import torch

    name, sharers = options.device, 1
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            slot, count = (int((slots or {}).get(word) or default) for word, default in (("slot", 0), ("slots", 1)))
            gpus = torch.cuda.device_count()
            name, sharers = f"cuda:{slot % gpus}", -(-count // gpus)
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise EngineError("ENGINE_FAILED", f"FLEET_DIFFUSERS_DEVICE={name}: torch sees no such GPU here")
        torch.cuda.set_device(name if ":" in name else 0)
    gpu = not name.startswith("cpu")
    dtype = (torch.float16 if gpu else torch.float32) if options.dtype == "auto" else getattr(torch, options.dtype)
    machine = psutil.virtual_memory().total
    memory = options.memory_bytes or machine // 2
    if not options.memory_bytes and name.startswith("cuda"):
        memory = int(torch.cuda.get_device_properties(name).total_memory * _SHARE) // sharers
    return Device(
        name,
        dtype,
        options.storage == "float8",
        options.compile == "on" or (options.compile == "auto" and gpu),
        options.sizes(gpu),
        memory,
        # On a processor both tiers lie in the same memory.
        options.host_memory_bytes or machine // (2 if gpu else 4),
    )
