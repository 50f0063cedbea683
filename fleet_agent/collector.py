"""The garbage collector of the agent's own process; engines' processes keep to its defaults, since what they leave in
cycles may be large."""

from __future__ import annotations

import gc

_YOUNG_OBJECTS = 5_000
"""So many more containers than were given back begin a collection of the young: a millisecond at most."""


def settle_memory() -> None:
    """Tells the collector that what is there now stays: modules, descriptors, what was wired.

    To be called once, when the process begins its work. Each full collection would go through all of it, a pause of
    tens of milliseconds. What comes after is looked at less often: almost all of it goes by itself.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, 10, 10)
