"""Models in memory: on the device by least recent use within a budget, then on the host, then gone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Shelved(Protocol):
    """What a shelf holds."""

    @property
    def memory_bytes(self) -> int:
        """What it takes, on either tier."""

    def to_device(self) -> None:
        """Moves it onto the device; may raise for lack of memory."""

    def to_host(self) -> None:
        """Moves it off the device."""


T = TypeVar("T", bound=Shelved)


class Shelf(Generic[T]):
    """Two tiers of models by name. Not for use from several threads.

    `free` says how much the device really has left; None where that is not known.
    """

    def __init__(self, device_bytes: int, host_bytes: int, free: Callable[[], int | None] = lambda: None) -> None:
        self._device: OrderedDict[str, T] = OrderedDict()
        self._host: OrderedDict[str, T] = OrderedDict()
        self._device_bytes, self._host_bytes, self._free = device_bytes, host_bytes, free

    @property
    def device(self) -> dict[str, T]:
        """On the device, least recently used first."""
        return dict(self._device)

    @property
    def host(self) -> dict[str, T]:
        """Off the device, least recently used first."""
        return dict(self._host)

    def take(self, name: str, load: Callable[[], T], needed: int) -> T:
        """The model, on the device and used last: from there, from the host, or by `load`, whose result is put there.

        `needed` is what it will take, as far as is known. One that is larger than the budget gets the device alone.
        """
        found = self._device.get(name)
        if found is not None:
            self._device.move_to_end(name)
            return found
        found = self._host.pop(name, None)
        self.make_room(found.memory_bytes if found is not None else needed)
        if found is None:
            found = load()
            self.make_room(found.memory_bytes)
        found.to_device()
        self._device[name] = found
        return found

    def make_room(self, needed: int) -> None:
        """Moves what was used longest ago off the device until `needed` bytes fit, or nothing is left."""
        while self._device and self._lacks(needed):
            name, old = self._device.popitem(last=False)
            self._move_off(name, old)

    def _lacks(self, needed: int) -> bool:
        if self._used(self._device) + needed > self._device_bytes:
            return True
        free = self._free()
        return free is not None and free < needed

    def only(self, name: str) -> None:
        """Moves everything but this one off the device."""
        for other in [one for one in self._device if one != name]:
            self._move_off(other, self._device.pop(other))

    def drop(self, name: str) -> bool:
        """Forgets a model on either tier; whether it was there."""
        return (self._device.pop(name, None) or self._host.pop(name, None)) is not None

    def _move_off(self, name: str, old: T) -> None:
        old.to_host()
        self._host[name] = old
        while self._host and self._used(self._host) > self._host_bytes:
            self._host.popitem(last=False)

    @staticmethod
    def _used(tier: OrderedDict[str, T]) -> int:
        return sum(one.memory_bytes for one in tier.values())
