"""The model folder as a cache: what is half there, what is whole, what may go."""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_agent.model_shelf import BadNameError, Kept, ModelShelf, Source, note_of, victims
from tests.models.making import model_bytes, put

DATA = model_bytes(3 << 20)
SOURCE = Source("checkpoint", "sub/a.safetensors", "s3://fleet-models/sub/a.safetensors", len(DATA), etag="e1")


@pytest.fixture
def shelf(tmp_path: Path) -> ModelShelf:
    shelf = ModelShelf(tmp_path / "models", sync_bytes=1 << 20)
    shelf.open()
    return shelf


def test_a_file_is_whole_or_not_there(shelf: ModelShelf) -> None:
    target = shelf.path("checkpoint", SOURCE.name)
    partial = shelf.partial(SOURCE)
    partial.open()
    partial.write(DATA[: 2 << 20])
    assert not target.exists() and shelf.survey() == []
    partial.write(DATA[2 << 20 :])
    assert not target.exists()
    partial.publish(target)
    assert target.read_bytes() == DATA
    assert not partial.path.exists()
    note = shelf.note(target)
    assert note is not None
    assert (note["sha256"], note["etag"]) == (hashlib.sha256(DATA).hexdigest(), "e1")
    (kept,) = shelf.survey()
    assert kept.brought and kept.key == SOURCE.key


def test_it_is_nobody_elses_before_its_last_write_has_ended(shelf: ModelShelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that is given up leaves a thread behind, which notes how far it came."""
    written, go_on, real = threading.Event(), threading.Event(), os.fdatasync

    def slow(file: int) -> None:
        written.set()
        assert go_on.wait(60)
        real(file)

    monkeypatch.setattr("fleet_agent.model_shelf.os.fdatasync", slow)
    one, two = shelf.partial(SOURCE), shelf.partial(SOURCE)
    one.open()
    with ThreadPoolExecutor(2) as threads:
        writing = threads.submit(one.write, DATA[: 1 << 20])
        assert written.wait(60)
        closing = threads.submit(one.close)
        # Were it closed at once, that takes no longer.
        wait([closing], timeout=0.1)
        with pytest.raises(BlockingIOError):
            two.open()
        go_on.set()
        writing.result(60)
        closing.result(60)
    two.close()
    two.open()
    assert two.size == 1 << 20
    two.close()


def test_it_goes_on_from_what_surely_reached_the_disk(shelf: ModelShelf) -> None:
    half = shelf.partial(SOURCE)
    half.open()
    half.write(DATA[: 1 << 20])
    half.write(DATA[1 << 20 : (1 << 20) + 1000])
    half.close()
    # What came after the last sync may be noughts after a power cut.
    with half.path.open("r+b") as file:
        file.seek(1 << 20)
        file.write(bytes(1000))
    again = shelf.partial(SOURCE)
    again.open()
    assert again.size == 1 << 20
    again.write(DATA[1 << 20 :])
    assert again.sha256 == hashlib.sha256(DATA).hexdigest()
    again.close()


@pytest.mark.parametrize("change", [{"etag": "e2"}, {"size_bytes": len(DATA) - 1}, {"sha256": "0" * 64}])
def test_another_version_begins_at_nought(shelf: ModelShelf, change: dict[str, str]) -> None:
    half = shelf.partial(SOURCE)
    half.open()
    half.write(DATA[: 2 << 20])
    half.close()
    other = shelf.partial(replace(SOURCE, **change))  # type: ignore[arg-type]
    other.open()
    assert other.size == 0 and other.path == half.path
    other.close()


def test_two_agents_on_one_folder_do_not_write_one_file(shelf: ModelShelf) -> None:
    one, two = shelf.partial(SOURCE), shelf.partial(SOURCE)
    one.open()
    with pytest.raises(BlockingIOError):
        two.open()
    two.close()
    one.close()


@pytest.mark.parametrize(
    "name",
    [
        "../a.safetensors",
        "a/../../b.safetensors",
        "/etc/a.safetensors",
        ".hidden.safetensors",
        "a//b.safetensors",
        "a.ckpt",
        "",
        "a\0b.safetensors",
        "a\n.safetensors",
        "x" * 260 + ".safetensors",
    ],
)
def test_names_that_lead_elsewhere_are_refused(shelf: ModelShelf, name: str) -> None:
    with pytest.raises(BadNameError):
        shelf.path("checkpoint", name)


def test_a_folder_that_is_a_link_elsewhere_is_refused(shelf: ModelShelf, tmp_path: Path) -> None:
    root = shelf.path("checkpoint", "a.safetensors").parent
    root.mkdir(parents=True, exist_ok=True)
    (root / "out").symlink_to(tmp_path)
    with pytest.raises(BadNameError, match="outside"):
        shelf.path("checkpoint", "out/a.safetensors")
    assert shelf.path("checkpoint", "in/a..b (1).safetensors") == root / "in" / "a..b (1).safetensors"


def test_a_file_that_was_replaced_by_hand_is_not_ours_any_more(shelf: ModelShelf) -> None:
    target = shelf.path("lora", "b.safetensors")
    partial = shelf.partial(Source("lora", "b.safetensors", "s3://x", len(DATA)))
    partial.open()
    partial.write(DATA)
    partial.publish(target)
    assert shelf.survey()[0].brought
    put(target, DATA + b"x")
    assert not shelf.survey()[0].brought


def test_what_is_left_over_is_tidied_up(shelf: ModelShelf, tmp_path: Path) -> None:
    old, young = tmp_path / "models/.partial/old.part", tmp_path / "models/.partial/young.part"
    for path in (old, young):
        put(path, b"x")
    os.utime(old, (0, 0))
    note = note_of(shelf.path("lora", "gone.safetensors"))
    put(note, b"{}")
    shelf.open()
    assert not old.exists() and young.exists() and not note.exists()


def test_use_is_what_counts_as_last(shelf: ModelShelf, tmp_path: Path) -> None:
    paths = [put(shelf.path("checkpoint", f"{name}.safetensors"), DATA) for name in "abc"]
    for index, path in enumerate(paths):
        os.utime(path, (1000 + index, 5))
    shelf.used([paths[0]])
    order = [one.name[0] for one in sorted(shelf.survey(), key=lambda one: one.used_at)]
    assert order == ["b", "c", "a"]
    assert paths[0].stat().st_mtime == 5


KEPT = st.lists(
    st.builds(
        Kept,
        st.just("checkpoint"),
        st.uuids().map(str),
        st.just(Path("/x")),
        st.integers(0, 100),
        st.floats(0, 100),
        st.booleans(),
    ),
    max_size=8,
)


@given(KEPT, st.integers(0, 300), st.integers(0, 300), st.integers(0, 300), st.integers(0, 50))
def test_enough_goes_and_no_more(kept: list[Kept], needed: int, budget: int, free: int, floor: int) -> None:
    total = sum(one.size_bytes for one in kept)
    gone = victims(kept, needed, may_go=lambda one: one.brought, total=total, budget=budget, free=free, floor=floor)
    movable = sorted((one for one in kept if one.brought), key=lambda one: (one.used_at, one.name))

    def fits(removed: list[Kept]) -> bool:
        freed = sum(one.size_bytes for one in removed)
        return (not budget or total - freed + needed <= budget) and free + freed - needed >= floor

    if gone is None:
        assert not fits(movable)
        return
    assert fits(gone)
    assert gone == movable[: len(gone)]
    assert not gone or not fits(gone[:-1])
