"""What a node says that it can do, and which engine runs what."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest
from fleet.v1 import types_pb2

from fleet_agent.attempt import RefusedError, plan
from fleet_agent.engines import sketch_model
from fleet_agent.engines.models import ModelFolder, Scan
from fleet_agent.inventory import Inventory, model_fields
from fleet_agent.slot_process import SlotProcess
from tests.agent.helpers import assign_of, settings_of
from tests.waiting import wait_until


def make(folder: Path, name: str, *more: str) -> Path:
    lora = "--lora" in more
    assert sketch_model.main(["--out", str(folder), "--name", name, *more]) == 0
    return folder / ("loras" if lora else "checkpoints") / name


async def loaded(folder: Path, *engines: str) -> Inventory:
    inventory = Inventory(settings_of(folder, engines=engines))
    await inventory.load()
    return inventory


def listed(inventory: Inventory) -> list[tuple[str, str, str]]:
    return sorted((model.kind, model.name, model.engine) for model in inventory.models())


async def test_engines_with_their_job_types(tmp_path: Path) -> None:
    inventory = await loaded(tmp_path, "sketch", "probe", "absent")
    engines = {engine.name: engine for engine in inventory.engines()}
    assert {name: engine.status for name, engine in engines.items()} == {
        "absent": "failed",
        "probe": "ready",
        "sketch": "ready",
    }
    assert "no engine named 'absent'" in engines["absent"].detail
    assert list(engines["sketch"].job_types) == [types_pb2.JOB_TYPE_IMAGE_GEN]
    assert types_pb2.JOB_TYPE_CUSTOM in engines["probe"].job_types
    assert engines["sketch"].version == inventory.version_of("sketch")


async def test_files_of_the_model_folder_and_built_in_models(tmp_path: Path) -> None:
    path = make(tmp_path / "models", "dusk.safetensors")
    make(tmp_path / "models", "soft.safetensors", "--lora")
    (tmp_path / "models" / "checkpoints" / "broken.safetensors").write_bytes(b"no model")
    (tmp_path / "models" / "checkpoints" / "notes.txt").write_bytes(b"no model either")
    inventory = await loaded(tmp_path, "sketch")
    assert listed(inventory) == [
        ("checkpoint", "dusk.safetensors", "sketch"),
        ("checkpoint", "sketch", "sketch"),
        ("lora", "soft.safetensors", "sketch"),
    ]
    assert len(inventory.warnings) == 1
    assert inventory.warnings[0].startswith("checkpoints/broken.safetensors: ")
    models = {model.name: model for model in inventory.models()}
    assert models["dusk.safetensors"].size_bytes == path.stat().st_size
    assert models["dusk.safetensors"].format == "safetensors"
    assert models["dusk.safetensors"].sha256 == ""
    assert models["sketch"].format == ""
    assert list(models["sketch"].job_types) == [types_pb2.JOB_TYPE_IMAGE_GEN]
    assert models["soft.safetensors"].trigger_words


async def test_files_that_no_engine_runs_are_not_listed(tmp_path: Path) -> None:
    make(tmp_path / "models", "dusk.safetensors")
    inventory = await loaded(tmp_path, "probe")
    assert listed(inventory) == [("checkpoint", "probe", "probe")]
    assert inventory.engine_for("image_gen", inventory.file("checkpoint", "dusk.safetensors")) is None


async def test_the_watch_finds_hashes_and_forgets_files(tmp_path: Path) -> None:
    inventory = await loaded(tmp_path, "sketch")
    watch = asyncio.create_task(inventory.watch())
    try:
        path = make(tmp_path / "models", "dusk.safetensors")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        await wait_until(lambda: [model.sha256 for model in inventory.models() if model.format] == [digest])
        make(tmp_path / "models", "dusk.safetensors", "--seed", "9")
        other = hashlib.sha256(path.read_bytes()).hexdigest()
        assert other != digest
        await wait_until(lambda: [model.sha256 for model in inventory.models() if model.format] == [other])
        path.unlink()
        await wait_until(lambda: listed(inventory) == [("checkpoint", "sketch", "sketch")])
        assert not watch.done()
    finally:
        watch.cancel()


async def test_headers_are_read_again_only_where_files_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "models", "dusk.safetensors")
    inventory = await loaded(tmp_path, "sketch")
    scans: list[int] = []
    scan = ModelFolder.scan

    def counted(self: ModelFolder) -> Scan:
        scans.append(1)
        return scan(self)

    monkeypatch.setattr(ModelFolder, "scan", counted)
    for _ in range(5):
        await inventory.rescan()
    assert scans == []
    make(tmp_path / "models", "dawn.safetensors")
    await inventory.rescan()
    assert scans == [1]
    assert ("checkpoint", "dawn.safetensors", "sketch") in listed(inventory)


async def test_a_scan_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inventory = await loaded(tmp_path, "sketch")
    failed = threading.Event()

    def failing(self: ModelFolder) -> Any:
        failed.set()
        raise OSError("stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(ModelFolder, "scan", failing)
        watch = asyncio.create_task(inventory.watch())
        make(tmp_path / "models", "dusk.safetensors")
        await wait_until(failed.is_set)
    try:
        await wait_until(lambda: len(listed(inventory)) == 2)
    finally:
        watch.cancel()


async def test_a_cancelled_watch_stops_hashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "models", "dusk.safetensors")
    inventory = await loaded(tmp_path, "sketch")
    begun, stopped = threading.Event(), threading.Event()

    def endless(self: ModelFolder, stop: Any) -> tuple[()]:
        begun.set()
        while not stop():
            stopped.wait(0.01)
        stopped.set()
        return ()

    monkeypatch.setattr(ModelFolder, "hash_missing", endless)
    watch = asyncio.create_task(inventory.watch())
    await wait_until(begun.is_set)
    watch.cancel()
    await wait_until(stopped.is_set)


async def test_a_checkpoint_and_a_lora_of_one_name_are_two_files(tmp_path: Path) -> None:
    checkpoint = make(tmp_path / "models", "same.safetensors")
    lora = make(tmp_path / "models", "same.safetensors", "--lora")
    inventory = await loaded(tmp_path, "sketch")
    found = {kind: inventory.file(kind, "same.safetensors") for kind in ("checkpoint", "lora")}
    assert found["checkpoint"] is not None
    assert found["lora"] is not None
    assert (found["checkpoint"].path, found["lora"].path) == (checkpoint, lora)


def slot_of(folder: Path) -> SlotProcess:
    return SlotProcess(0, folder, folder)


async def test_a_plan_names_engine_model_loras_and_how_it_was_made(tmp_path: Path) -> None:
    make(tmp_path / "models", "dusk.safetensors")
    make(tmp_path / "models", "soft.safetensors", "--lora")
    inventory = await loaded(tmp_path, "sketch")
    assign = assign_of(
        "t1", "a sunset", model="dusk.safetensors", loras={"soft.safetensors": 0.75}, steps=7, negative_prompt=""
    )
    assign.target_model = "dusk"
    attempt = plan(assign, slot_of(tmp_path), inventory, tmp_path / "out")
    task = attempt.task
    assert (task["engine"], task["job_type"], task["token"]) == ("sketch", "image_gen", "t1")
    assert task["seed"] == str(2**64 - 1)
    assert task["fields"] == {"prompt": "a sunset", "steps": 7, "negative_prompt": ""}
    assert task["model"] == model_fields(inventory.file("checkpoint", "dusk.safetensors"))
    assert [(use["file"]["name"], use["weight"]) for use in task["loras"]] == [("soft.safetensors", 0.75)]
    metadata = attempt.metadata
    assert (metadata.model, metadata.resolved_model) == ("dusk", "dusk.safetensors")
    assert (metadata.prompt, metadata.steps, metadata.engine) == ("a sunset", 7, "sketch")
    assert metadata.HasField("negative_prompt")
    assert not metadata.HasField("guidance_scale")


@pytest.mark.parametrize(
    ("assign", "reason"),
    [
        (assign_of("t1", model="absent.safetensors"), "MODEL_NOT_FOUND"),
        (assign_of("t1", model="soft.safetensors"), "MODEL_NOT_FOUND"),
        (assign_of("t1", loras={"absent.safetensors": 1.0}), "LORA_NOT_FOUND"),
        (assign_of("t1", loras={"dusk.safetensors": 1.0}), "LORA_NOT_FOUND"),
    ],
    ids=["no model", "a lora as the model", "no lora", "a model as the lora"],
)
async def test_a_plan_without_its_files_is_refused(tmp_path: Path, assign: Any, reason: str) -> None:
    make(tmp_path / "models", "dusk.safetensors")
    make(tmp_path / "models", "soft.safetensors", "--lora")
    inventory = await loaded(tmp_path, "sketch")
    with pytest.raises(RefusedError) as refused:
        plan(assign, slot_of(tmp_path), inventory, tmp_path)
    assert refused.value.reason == reason
    assert "this node has no" in refused.value.detail


async def test_progress_is_a_whole_percentage(tmp_path: Path) -> None:
    inventory = await loaded(tmp_path, "probe")
    attempt = plan(assign_of("t1"), slot_of(tmp_path), inventory, tmp_path)
    assert attempt.progress == 0
    assert not attempt.held().HasField("steps")
    for step, steps, progress in ((1, 3, 33), (2, 3, 66), (3, 3, 100), (9, 3, 100), (-1, 3, 0), (5, 0, 0)):
        attempt.step, attempt.steps = step, steps
        assert attempt.progress == progress
