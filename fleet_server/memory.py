"""The memory of the server's process."""

from __future__ import annotations

import ctypes
import gc

_YOUNG_OBJECTS = 5_000
"""So many more containers than were given back begin a collection of the young: a millisecond at most."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h> of glibc
_KEPT_BYTES = 16 << 20
_BUFFER_BYTES = 4 << 20
"""Chunks of files and whole pictures are smaller."""


def settle_memory() -> None:
    """To be called once, when everything is wired.

    Tells the garbage collector that what is there now stays: descriptors and converters, some 100,000 objects. Each
    full collection would go through all of them, a pause of tens of milliseconds. What comes after is looked at less
    often: almost all of it goes by itself, without the collector.

    And tells glibc to keep some memory that was given back: else each copy of a picture is made of pages that the
    kernel has to find and clear, which takes several times as long as the copy.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, 10, 10)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _BUFFER_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
