"""What goes wrong in a simulated fleet, and how often."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from fleet_agent.simulation.profiles import NodePlan

SLOW_PACE = 0.3


class FaultsError(ValueError):
    """The words of --faults make no sense; the text says which and what is allowed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Faults:
    """Rates and shares. `crash` and `disconnect` are per node and hour, all others are shares between 0 and 1."""

    crash: float = 0.0
    """The agent dies, and comes back as a new one with its spool and nothing else."""
    disconnect: float = 0.0
    """The stream is cut and stays away for a while; the work goes on."""
    slow: float = 0.0
    """Of the nodes: they run at a third of their speed."""
    failing: float = 0.0
    """Of the nodes: one of their models always fails."""
    engine: float = 0.0
    """Of the attempts: the engine's process dies in the middle."""
    oom: float = 0.0
    """Of the attempts: out of memory."""

    @property
    def any(self) -> bool:
        return any(getattr(self, field.name) for field in dataclasses.fields(self))


NONE = Faults()
SOME = Faults(crash=2, disconnect=10, slow=0.05, failing=0.02, engine=0.01, oom=0.01)
_WORDS = {"none": NONE, "some": SOME}


def parse_faults(text: str) -> Faults:
    """`none`, `some`, or names with numbers: `disconnect=30,oom=0.02`. Raises FaultsError."""
    if text in _WORDS:
        return _WORDS[text]
    known = [field.name for field in dataclasses.fields(Faults)]
    values: dict[str, float] = {}
    for word in text.replace(",", " ").split():
        name, _, number = word.partition("=")
        if name not in known:
            raise FaultsError(f"faults: there is no {name!r}; there are none, some, or any of {', '.join(known)}")
        try:
            value = float(number)
        except ValueError:
            raise FaultsError(f"faults: {name} needs a number, as in {name}=0.1") from None
        most = float("inf") if name in ("crash", "disconnect") else 1.0
        if not 0 <= value <= most:
            limit = "0 or more, per node and hour" if most > 1 else "a share, 0 to 1"
            raise FaultsError(f"faults: {name} must be {limit}, not {number}")
        values[name] = value
    return Faults(**values)


def afflicted(plans: Sequence[NodePlan], faults: Faults, rng: random.Random) -> list[NodePlan]:
    """The plans with slow nodes and failing models among them."""
    found = []
    for plan in plans:
        slow, failing = rng.random() < faults.slow, rng.random() < faults.failing
        names = [model.name for model in plan.models if model.kind == "checkpoint"]
        found.append(
            dataclasses.replace(
                plan,
                pace=plan.pace * (SLOW_PACE if slow else 1.0),
                failing=rng.choice(names) if failing and names else "",
            )
        )
    return found
