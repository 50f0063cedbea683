"""The model folder: headers are read, hashes kept, and a bad file never hides the good ones."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fleet_agent.engines.models import BadModelFile, ModelFolder, read_header


def _save(path: Path, metadata: dict[str, str] | None = None, tensor: str = "weight") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({tensor: np.arange(6, dtype=np.float32)}, path, metadata)
    return path


def test_files_are_listed_sorted_with_what_their_header_says(tmp_path: Path) -> None:
    _save(tmp_path / "loras/z.safetensors", {"architecture": "sketch", "trigger_words": '["ink", " ink style "]'})
    _save(
        tmp_path / "loras/sub/a.safetensors",
        {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.trigger_phrase": "a, b"},
    )
    _save(tmp_path / "checkpoints/b.safetensors", tensor="conditioner.embedders.1.model.x")
    _save(tmp_path / "checkpoints/a.safetensors")
    _save(tmp_path / "checkpoints/.hidden/c.safetensors")
    (tmp_path / "checkpoints/notes.txt").write_text("not a model")
    found = [(f.kind, f.name, f.architecture, f.trigger_words) for f in ModelFolder(tmp_path).scan().files]
    assert found == [
        ("checkpoint", "a.safetensors", None, ()),
        ("checkpoint", "b.safetensors", "sdxl", ()),
        ("lora", "sub/a.safetensors", "sdxl", ("a", "b")),
        ("lora", "z.safetensors", "sketch", ("ink", "ink style")),
    ]


def test_a_folder_in_the_layout_of_diffusers_is_one_model(tmp_path: Path) -> None:
    """Its parts are no models of their own; a layout without weights is none at all."""
    model = tmp_path / "checkpoints/sets/xl"
    unet = _save(model / "unet/weights.safetensors")
    (model / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    layout = tmp_path / "checkpoints/single"
    layout.mkdir()
    (layout / "model_index.json").write_text("{}")
    _save(tmp_path / "checkpoints/single.safetensors")
    folder = ModelFolder(tmp_path)
    files = folder.scan().files
    assert [(file.name, file.architecture) for file in files] == [("sets/xl", "sdxl"), ("single.safetensors", None)]
    assert files[0].size_bytes == unet.stat().st_size + (model / "model_index.json").stat().st_size
    before = {file.name: file.sha256 for file in folder.hash_missing()}
    assert len(before["sets/xl"] or "") == 64
    unet.rename(unet.with_name("other.safetensors"))
    os.utime(unet.with_name("other.safetensors"), ns=(1, 2**61))
    assert [file.name for file in folder.hash_missing()] == ["sets/xl"]
    assert folder.scan().files[0].sha256 != before["sets/xl"]
    (model / "model_index.json").write_text("{")
    assert list(folder.scan().problems) == ["checkpoints/sets/xl"]


def test_no_folder_is_no_models(tmp_path: Path) -> None:
    scan = ModelFolder(tmp_path / "nonesuch").scan()
    assert scan.files == () and scan.problems == {}


def test_hashes_come_later_and_are_kept(tmp_path: Path) -> None:
    path = _save(tmp_path / "checkpoints/a.safetensors")
    folder = ModelFolder(tmp_path)
    assert folder.scan().files[0].sha256 is None
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert [file.sha256 for file in folder.hash_missing()] == [expected]
    assert folder.hash_missing() == ()
    assert ModelFolder(tmp_path).scan().files[0].sha256 == expected


def test_a_changed_file_is_hashed_anew_and_the_old_hash_forgotten(tmp_path: Path) -> None:
    path = _save(tmp_path / "checkpoints/a.safetensors")
    folder = ModelFolder(tmp_path)
    folder.hash_missing()
    _save(path, {"title": "changed"})
    os.utime(path, ns=(1, 1))
    assert folder.scan().files[0].sha256 is None
    folder.hash_missing()
    assert folder.scan().files[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(json.loads((tmp_path / ".hashes.json").read_text())) == 1


def test_hashing_stops_when_told(tmp_path: Path) -> None:
    _save(tmp_path / "checkpoints/a.safetensors")
    folder = ModelFolder(tmp_path)
    assert folder.hash_missing(stop=lambda: True) == ()
    assert folder.scan().files[0].sha256 is None


def test_a_broken_cache_is_made_anew(tmp_path: Path) -> None:
    _save(tmp_path / "checkpoints/a.safetensors")
    (tmp_path / ".hashes.json").write_text("{broken")
    folder = ModelFolder(tmp_path)
    assert len(folder.hash_missing()) == 1


def _raw(header: bytes, tail: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + tail


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "shorter"),
        (b"\xff" * 64, "claims a header"),
        (_raw(b"{nonsense"), "not JSON"),
        (_raw(b"[" * 5000), "not JSON"),
        (_raw(b"[1]"), "not a JSON object"),
        (_raw(b'{"w": {"dtype": "F32"}}'), "no data_offsets"),
        (_raw(b'{"w": {"data_offsets": [0, 100]}}', b"short"), "cut short"),
    ],
)
def test_a_bad_file_is_a_problem_with_a_reason(tmp_path: Path, data: bytes, problem: str) -> None:
    _save(tmp_path / "checkpoints/good.safetensors")
    bad = tmp_path / "checkpoints/bad.safetensors"
    bad.write_bytes(data)
    with pytest.raises(BadModelFile, match=problem):
        read_header(bad)
    scan = ModelFolder(tmp_path).scan()
    assert [file.name for file in scan.files] == ["good.safetensors"]
    assert problem in scan.problems["checkpoints/bad.safetensors"]
