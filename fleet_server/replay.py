"""The command that this package brings to `fleet` for decisions of dispatch: `replay`."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, NoReturn

import typer

_SHOWN = 10


def replay(
    decisions: Annotated[Path, typer.Argument(help="What a server wrote with FLEET_DECISIONS_FILE set.")],
    seen: Annotated[
        Path | None, typer.Option(help="What `fleet simulate --record` wrote: was all of it decided so?")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make every recorded decision of dispatch again, by the pure functions of placement, and report differences.

    A server writes its decisions, each with all that it was made of, to the file in FLEET_DECISIONS_FILE. It is made
    anew at each start.

    Exit codes: 0 all the same, 1 differences, 2 a file that cannot be read.
    """
    import orjson

    from fleet_server.services.decisions import BadRecordError
    from fleet_server.services.decisions import replay as made_again

    try:
        with decisions.open("rb") as lines:
            found = made_again(lines)
        assigned: Counter[tuple[str, str]] = Counter()
        if seen is not None:
            with seen.open("rb") as lines:
                notes = [orjson.loads(line) for line in lines]
            assigned.update((one["node_id"], one["model"]) for one in notes if one["what"] == "assign")
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}; give the file that a server wrote with FLEET_DECISIONS_FILE set")
    except (BadRecordError, ValueError, KeyError, TypeError) as error:
        _fail(f"{error}: is it a file of decisions, and --seen one of `fleet simulate --record`?")
    undecided = assigned - found.placements
    code = 1 if found.differences or undecided else 0
    if as_json:
        report = {
            "decisions": found.decisions,
            "placed": found.placed,
            "deferred": found.deferred,
            "differences": [str(difference) for difference in found.differences],
            "assignments": assigned.total() if seen is not None else None,
            "undecided": [
                {"node_id": node_id, "model": model, "count": count}
                for (node_id, model), count in sorted(undecided.items())
            ],
        }
        sys.stdout.write(orjson.dumps(report).decode() + "\n")
        raise typer.Exit(code)
    sys.stdout.write(
        f"{found.decisions:,} decisions, {found.placed:,} jobs placed, {found.deferred:,} deferrals: "
        f"{len(found.differences):,} differ\n"
    )
    if seen is not None:
        sys.stdout.write(f"{assigned.total():,} assignments seen by agents: {undecided.total():,} were never decided\n")
    for difference in found.differences[:_SHOWN]:
        sys.stdout.write(f"{difference}\n")
    for (node_id, model), count in sorted(undecided.items())[:_SHOWN]:
        sys.stdout.write(f"{node_id}: {count} of {model} not decided\n")
    raise typer.Exit(code)


def _fail(text: str) -> NoReturn:
    sys.stderr.write(f"fleet: {text}\n")
    raise typer.Exit(2)
