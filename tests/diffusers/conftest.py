"""The tiny SDXL, made once for all tests of this folder that one worker runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.diffusers import micro
from tests.parts import need_packages


@pytest.fixture(scope="session")
def _packages() -> None:
    need_packages("torch", "diffusers", "transformers", "accelerate", "peft")


@pytest.fixture(scope="session")
def models(_packages: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with the model as a folder and as one file, and a LoRA."""
    folder = tmp_path_factory.mktemp("sdxl") / "models"
    micro.make(folder)
    return folder


@pytest.fixture(autouse=True, scope="session")
def _offline(_packages: None) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    patch.undo()
