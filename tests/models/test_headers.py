"""What a header says of a model: the server reads it from a bucket as agents read it from a disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_agent.engines import models as on_disk
from fleet_server.domain.model_header import LENGTH_BYTES, BadHeaderError, ModelHeader, header_length, read_header
from tests.models.making import header_of, put

NAMES = st.sampled_from(
    [
        "conditioner.embedders.1.x",
        "lora_te2_a",
        "model.diffusion_model.joint_blocks.0",
        "model.diffusion_model.double_blocks.1",
        "double_blocks.0",
        "cond_stage_model.model.y",
        "cond_stage_model.transformer.z",
        "something",
    ]
)
WORDS = st.sampled_from(
    [
        "",
        "sdxl_base_v1-0",
        "SD_V1.5",
        "sd_v2",
        "flux.1-dev",
        "sketch",
        "x" * 90,
        "ink, brush",
        '["a","b",3]',
        "[no",
        " , ",
    ]
)
KEYS = st.sampled_from(
    [
        "architecture",
        "modelspec.architecture",
        "ss_base_model_version",
        "trigger_words",
        "modelspec.trigger_phrase",
        "title",
    ]
)


@given(
    st.dictionaries(KEYS, WORDS, max_size=4),
    st.lists(NAMES, unique=True, max_size=4),
    st.integers(0, 40),
    st.integers(-60, 10),
)
def test_both_sides_read_the_same(
    tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, str], names: list[str], size: int, cut: int
) -> None:
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    data = header_of(metadata=metadata, tensors=dict.fromkeys(names, entry)) + bytes(size)
    data = data[: len(data) + cut] if cut < 0 else data + bytes(cut)
    path = put(tmp_path_factory.mktemp("header") / "m.safetensors", data)
    try:
        header = on_disk.read_header(path)
    except on_disk.BadModelFile:
        with pytest.raises(BadHeaderError):
            _read(data)
        return
    found = _read(data)
    assert found.architecture == (on_disk.architecture_of(header) or "")
    assert found.trigger_words == on_disk.trigger_words_of(header)


def _read(data: bytes) -> ModelHeader:
    length = header_length(data, len(data))
    return read_header(data[LENGTH_BYTES : LENGTH_BYTES + length], len(data))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\0\0", "shorter"),
        (b"\xff" * 16, "claims a header"),
        (b"\2\0\0\0\0\0\0\0[]", "not a JSON object"),
        (b"\2\0\0\0\0\0\0\0{x", "not JSON"),
        (b"\x09\0\0\0\0\0\0\0" + b'{"t": {}}', "data_offsets"),
    ],
)
def test_what_is_no_header_is_told(data: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(BadHeaderError, match=words):
        _read(data)
    with pytest.raises(on_disk.BadModelFile):
        on_disk.read_header(put(tmp_path / "m", data))


def test_a_header_of_many_megabytes_is_not_read() -> None:
    with pytest.raises(BadHeaderError, match="more than"):
        header_length((17 << 20).to_bytes(8, "little"), 1 << 30)
