"""Settings of the diffusers engine, from FLEET_DIFFUSERS_* variables of the agent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

from fleet_agent.engines.base import EngineError

PREFIX = "FLEET_DIFFUSERS_"
_CHOICES = {
    "dtype": ("auto", "float32", "float16", "bfloat16"),
    "storage": ("auto", "float8"),
    "compile": ("auto", "on", "off"),
}


@dataclass(frozen=True, slots=True)
class Options:
    """How the engine uses the machine.

    `device` is a torch device or `auto` (the first GPU, else the processor). `dtype` is what it computes in, `auto`
    being float16 on a GPU and float32 else; `storage` float8 keeps the UNet's weights in half of that. `memory_bytes`
    is the budget for models on the device and `host_memory_bytes` for those that were moved off it, 0 being 90 % of
    the device and half of the machine. `max_batch` counts pictures of 1024 x 1024; of smaller ones more go together.
    `compile` is torch.compile with CUDA graphs, `auto` being where there is a GPU. `warm` are sizes such as
    `1024x1024,832x1216` that a model is compiled and measured for when it is loaded, or `off`, or `auto`, which is
    1024x1024 on a GPU.
    """

    device: str = "auto"
    dtype: str = "auto"
    storage: str = "auto"
    memory_bytes: int = 0
    host_memory_bytes: int = 0
    max_batch: int = 4
    compile: str = "auto"
    warm: str = "auto"

    def sizes(self, gpu: bool) -> tuple[tuple[int, int], ...]:
        """What `warm` says: width and height of each."""
        if self.warm in ("auto", "off"):
            return ((1024, 1024),) if gpu and self.warm == "auto" else ()
        return tuple(_size(word) for word in self.warm.replace(",", " ").split())

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self:
        """Reads the variables. Raises EngineError naming one that makes no sense."""
        given: dict[str, object] = {}
        for one in fields(cls):
            name = PREFIX + one.name.upper()
            text = environment.get(name, "").strip()
            if not text:
                continue
            given[one.name] = _number(name, text) if isinstance(one.default, int) else _word(name, one.name, text)
        made = cls(**given)  # type: ignore[arg-type]
        try:
            made.sizes(gpu=True)
        except ValueError as error:
            raise EngineError("INVALID_FIELD", f"{PREFIX}WARM: {error}") from error
        return made


def _size(word: str) -> tuple[int, int]:
    width, times, height = word.partition("x")
    if not (times and width.isdecimal() and height.isdecimal()):
        raise ValueError(f"must be sizes like 1024x1024, `auto` or `off`; got {word!r}")
    size = int(width), int(height)
    if not all(64 <= side <= 2048 and side % 8 == 0 for side in size):
        raise ValueError(f"sides are multiples of 8 from 64 to 2048; got {word!r}")
    return size


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise EngineError("INVALID_FIELD", f"{name}: must be a whole number, got {text!r}")
    number = int(text)
    if name.endswith("MAX_BATCH") and not 1 <= number <= 64:
        raise EngineError("INVALID_FIELD", f"{name}: must be from 1 to 64, got {number}")
    return number


def _word(name: str, field: str, text: str) -> str:
    choices = _CHOICES.get(field)
    if choices is not None and text not in choices:
        raise EngineError("INVALID_FIELD", f"{name}: must be one of {', '.join(choices)}; got {text!r}")
    return text
