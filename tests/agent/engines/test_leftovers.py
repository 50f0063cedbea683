"""What a process could not end is ended by who comes next, and tried again until it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleet_agent.engines.leftovers import Leftovers


def test_a_name_stays_until_it_could_be_ended(tmp_path: Path) -> None:
    leftovers, asked = Leftovers(tmp_path / "notes"), list[str]()

    def refuses(name: str) -> bool:
        asked.append(name)
        return False

    def fails(name: str) -> None:
        asked.append(name)
        raise ConnectionError

    leftovers.end(refuses)
    leftovers.note("one")
    leftovers.end(refuses)
    assert not asked, "its process lives"
    leftovers.give_up()
    leftovers.note("two")
    leftovers.end(refuses)
    with pytest.raises(ConnectionError):
        leftovers.end(fails)
    leftovers.end(asked.append)
    assert asked == ["one"] * 3
    leftovers.end(asked.append)
    leftovers.done()
    assert asked == ["one"] * 3
    assert not list((tmp_path / "notes").iterdir())
