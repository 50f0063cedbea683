"""All trials at full size: `python -m tests.chaos` (or `make chaos`); exit code 1 if a promise was broken.

    python -m tests.chaos [--seeds 20] [--seconds 30] [--first 1] [--mutants | --no-mutants] [--only NAME]

Each violation is printed with its seed, and the history is kept in the folder that is named: the same seed breaks
the same parts at the same moments.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.chaos.mutants import MUTANTS, Mutant, mutated
from tests.chaos.trial import Verdict, trial

MUTANT_SEEDS = 5
"""A mutant has so many trials to be caught in."""


def main() -> int:
    """Runs what the arguments say; 1 if a trial found a violation or a mutant went unseen."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--seconds", type=float, default=30, help="of faults in each trial")
    parser.add_argument("--mutants", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--only", default="", help="one mutant alone")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fleet-chaos-"))
    good = options.only or _trials(folder, range(options.first, options.first + options.seeds), options.seconds)
    caught = not options.mutants or _mutants(folder, options.seconds, options.only)
    return 0 if good and caught else 1


def _run(folder: Path, seed: int, seconds: float, code: Path | None = None) -> Verdict:
    folder.mkdir()
    verdict, history = asyncio.run(trial(folder, seed, seconds, code=code))
    if verdict.violations:
        history.save(folder / "history.json")
    return verdict


def _trials(folder: Path, seeds: range, seconds: float) -> bool:
    good = True
    total: Counter[str] = Counter()
    for seed in seeds:
        verdict = _run(folder / f"seed{seed}", seed, seconds)
        total.update(verdict.counts)
        state = "kept" if not verdict.violations else "BROKEN"
        _say(f"seed {seed}: {state}; " + ", ".join(f"{count} {what}" for what, count in verdict.counts.items()))
        for line in verdict.violations:
            _say(f"  {line} (history: {folder / f'seed{seed}' / 'history.json'})")
        if not verdict.hard_enough:
            never = f"; never: {', '.join(sorted(verdict.missing))}" if verdict.missing else ""
            _say(f"  too little happened in this trial to mean anything{never}")
        good = good and not verdict.violations and verdict.hard_enough
    _say(f"{len(seeds)} trials: " + ", ".join(f"{count} {what}" for what, count in total.items()))
    return good


def _mutants(folder: Path, seconds: float, only: str) -> bool:
    unseen = []
    for mutant in MUTANTS:
        if not only or mutant.name == only:
            found = _catch(folder, mutant, seconds)
            _say(f"mutant {mutant.name}: {found or 'NOT CAUGHT'}")
            if not found:
                unseen.append(mutant.name)
    return not unseen


def _catch(folder: Path, mutant: Mutant, seconds: float) -> str:
    """The first violation that gives it away; empty if none did."""
    code = mutated(folder / mutant.name, mutant)
    for seed in range(1, MUTANT_SEEDS + 1):
        verdict = _run(folder / f"{mutant.name}-{seed}", seed, seconds, code)
        if not any(code.rglob("__pycache__")):
            raise AssertionError(f"mutant {mutant.name}: its code has not been run")
        if verdict.violations:
            return f"caught by seed {seed}: {verdict.violations[0]} ({len(verdict.violations)} in all)"
    return ""


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
