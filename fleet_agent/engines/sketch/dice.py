"""Randomness that is the same on every machine: SHA-256 for keys, the raw bits of PCG64 for draws."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
T = TypeVar("T")


class Dice:
    """A stream of draws named by its key. `child` streams do not depend on how much was drawn before."""

    def __init__(self, *key: object) -> None:
        self._key = "\x1f".join(str(part) for part in key)
        digest = hashlib.sha256(self._key.encode("utf-8", "replace")).digest()
        self._bits = np.random.PCG64(int.from_bytes(digest[:16], "big"))

    def child(self, *key: object) -> Dice:
        return Dice(self._key, *key)

    def floats(self, *shape: int) -> Array:
        """Return float32 draws in [0, 1), each a multiple of 2^-24."""
        raw = np.asarray(self._bits.random_raw(int(np.prod(shape))))
        return ((raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)).reshape(shape)

    def between(self, low: float, high: float) -> float:
        raw: int = self._bits.random_raw()
        return low + (high - low) * ((raw >> 11) * 2.0**-53)

    def below(self, n: int) -> int:
        raw: int = self._bits.random_raw()
        return (raw >> 11) % n

    def chance(self, probability: float) -> bool:
        return self.between(0.0, 1.0) < probability

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]
