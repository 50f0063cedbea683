"""The server with one guard taken out: each must be given away by some trial."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import fleet_server

PACKAGE = Path(fleet_server.__file__).parent


@dataclass(frozen=True, slots=True)
class Mutant:
    """In `file` of the server's package, `guard` becomes `without`."""

    name: str
    file: str
    guard: str
    without: str


MUTANTS = (
    Mutant(
        "complete-any-token",
        "store/scripts/complete.lua",
        "local current = j.st == 'running' and j.tk == token",
        "local current = j.st == 'running'",
    ),
    Mutant(
        "complete-any-state",
        "store/scripts/complete.lua",
        "local late = j.st == 'queued' and j.lt == token",
        "local late = j.lt == token",
    ),
    Mutant(
        "fail-any-token",
        "store/scripts/fail.lua",
        "if j.st ~= 'running' or j.tk ~= token then",
        "if j.st ~= 'running' then",
    ),
    Mutant("fail-any-state", "store/scripts/fail.lua", "if j.st ~= 'running' or j.tk ~= token then", "if false then"),
    Mutant(
        "cancel-any-state",
        "store/scripts/cancel.lua",
        "if j.st == 'succeeded' or j.st == 'failed' then",
        "if false then",
    ),
    Mutant("retry-any-state", "store/scripts/retry.lua", "if j.st ~= 'failed' then", "if false then"),
    Mutant(
        "submit-forgets-keys",
        "store/scripts/lib/submitted.lua",
        "local stored = key and redis.call('GET', key)",
        "local stored = nil",
    ),
    Mutant(
        "retries-without-end",
        "store/scripts/lib/attempts.lua",
        "if retryable and failures <= tonumber(j.mr or 0) then",
        "if retryable then",
    ),
    Mutant(
        "poison-goes-on",
        "store/scripts/lib/attempts.lua",
        "if set.lo >= POISON_LOSSES and (several or single) or set.lo >= POISON_LOSSES_ANYWHERE then",
        "if false then",
    ),
    Mutant("no-outbox", "store/scripts/lib/ends.lua", "if j.cb == '1' then", "if false then"),
    Mutant(
        "exclusive-as-any",
        "store/scripts/lib/base.lua",
        "return NOW + tonumber(lease) + (exclusive and EXCLUSIVE_MARGIN or 0)",
        "return NOW + tonumber(lease) / 4",
    ),
)
"""Guards whose loss a caller can see. Each guard of each script is also taken out in tests/store/test_guards.py, where
steps that callers cannot force are made by hand.
"""


def mutated(folder: Path, mutant: Mutant) -> Path:
    """A copy of the server's package with the mutant in it; the folder is to be put before all others on the path."""
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / PACKAGE.name / mutant.file
    text = file.read_text()
    if text.count(mutant.guard) != 1:
        raise AssertionError(f"{mutant.name}: {mutant.file} has its guard {text.count(mutant.guard)} times, not once")
    file.write_text(text.replace(mutant.guard, mutant.without))
    return folder
