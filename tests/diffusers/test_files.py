"""What files a model and its LoRAs may have and what is wrong with others; what is imported, and when."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fleet_agent.engines.base import EngineError, LoraUse, ModelFile
from fleet_agent.engines.diffusers.device import device_of
from fleet_agent.engines.diffusers.engine import DiffusersEngine
from fleet_agent.engines.diffusers.model import Model
from fleet_agent.engines.diffusers.options import Options
from tests.diffusers import micro
from tests.diffusers.test_engine import checkpoint, lora, make
from tests.diffusers.test_machine import latents, read

# What diffusers and torch do with each other and with NumPy is theirs.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning", "UserWarning")
]


def copy(models: Path, folder: Path) -> Path:
    return Path(shutil.copytree(models / "checkpoints" / micro.MODEL, folder / "copy"))


def test_weights_named_fp16_are_read_and_pickles_are_not(models: Path, tmp_path: Path) -> None:
    folder = copy(models, tmp_path)
    for path in list(folder.glob("*/*.safetensors")):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    file = ModelFile("half", folder, "checkpoint", 1, "a")
    device = device_of(Options("cpu"))
    whole = Model.read(checkpoint(models, micro.MODEL), models, device)
    assert Model.read(file, models, device).memory_bytes == whole.memory_bytes
    for path in folder.glob("vae/*.safetensors"):
        path.rename(path.with_name("diffusion_pytorch_model.fp16.bin"))
    with pytest.raises(EngineError, match="cannot read half"):
        Model.read(file, models, device)


def test_what_is_no_base_model_says_so(models: Path, tmp_path: Path) -> None:
    folder = copy(models, tmp_path)
    device = device_of(Options("cpu"))
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = index["tokenizer"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(EngineError, match="has no text_encoder: it is no base model of SDXL"):
        Model.read(ModelFile("refiner", folder, "checkpoint", 1, "a"), models, device)
    with pytest.raises(EngineError, match="cannot read empty"):
        Model.read(ModelFile("empty", tmp_path, "checkpoint", 1, "a"), models, device)


def test_nothing_heavy_is_imported_before_a_model_is_asked_for(tmp_path: Path) -> None:
    """Also when the engine is described and when a batch is gathered."""
    words: Sequence[str] = (
        "import sys",
        "from pathlib import Path",
        "import fleet_agent.slot",
        "from fleet_agent.engines import registry",
        "from fleet_agent.engines.base import EngineSettings, Task",
        f"folder = Path({str(tmp_path)!r})",
        "found = registry.discover(EngineSettings(folder, folder), ['diffusers', 'sketch'])",
        "assert [one.status for one in found.statuses] == ['ready', 'ready'], found",
        "task = Task('j', 'image_gen', None, (), {'prompt': 'x'}, 1, folder)",
        "engine = found.engines['diffusers']",
        "engine.batch_key(task), engine.batch_limit(task), engine.loaded(), engine.unload('x')",
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)",
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(words)], capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr


def test_an_engine_is_a_batch_engine(tmp_path: Path) -> None:
    from fleet_agent.engines.batch import BatchEngine

    assert isinstance(make(tmp_path, tmp_path), BatchEngine) and isinstance(make(tmp_path, tmp_path), DiffusersEngine)


def layer_of(model: Model) -> Any:
    return model.pipeline.unet.get_submodule("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")


def test_a_lora_that_fails_leaves_nothing_on(models: Path, tmp_path: Path) -> None:
    """Its first part fits and its second does not; another is for some other kind of model."""
    import torch
    from safetensors.torch import load_file, save_file

    inner = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    parts = {f"{inner}.lora_A.weight": torch.ones(4, 9), f"{inner}.lora_B.weight": torch.ones(9, 4)}
    save_file(load_file(models / "loras" / micro.LORA) | parts, tmp_path / "half.safetensors")
    save_file({"other.lora_A.weight": torch.ones(4, 4), "other.lora_B.weight": torch.ones(4, 4)}, tmp_path / "none")
    (tmp_path / "none").rename(tmp_path / "none.safetensors")
    model = read(models)
    before, layer = latents(model), layer_of(model)
    for name in ("half", "none"):
        use = LoraUse(ModelFile(name, tmp_path / f"{name}.safetensors", "lora", 1, name), 1.0)
        with pytest.raises(EngineError, match=f"{name} is no LoRA for {micro.MODEL}"):
            model.loras.apply((use,))
        assert model.loras.names == ()
        assert float((latents(model) - before).abs().max()) == 0
        # What was compiled knows the layer that it saw.
        assert layer_of(model) is layer
    model.loras.apply(lora(models))
    with_lora = latents(model)
    use = LoraUse(ModelFile("half", tmp_path / "half.safetensors", "lora", 1, "half"), 1.0)
    with pytest.raises(EngineError):
        model.loras.apply((*lora(models), use))
    assert {name for names in model.pipeline.get_list_adapters().values() for name in names} == {"lora_3"}
    model.loras.apply(lora(models))
    assert float((latents(model) - with_lora).abs().max()) == 0
    with pytest.raises(EngineError, match="is no longer on this node") as raised:
        model.loras.apply((LoraUse(ModelFile("gone", tmp_path / "gone.safetensors", "lora", 1, "g"), 1.0),))
    assert (raised.value.reason, raised.value.retryable) == ("LORA_NOT_FOUND", True)


def test_several_loras_weigh_in_together(models: Path, tmp_path: Path) -> None:
    shutil.copy(models / "loras" / micro.LORA, tmp_path / "twin.safetensors")
    twin = ModelFile("twin", tmp_path / "twin.safetensors", "lora", 1, "d")
    model = read(models)
    model.loras.apply(lora(models, 1.0))
    whole = latents(model)
    model.loras.apply((*lora(models, 0.25), LoraUse(twin, 0.75)))
    assert model.loras.names == (micro.LORA, "twin")
    assert float((latents(model) - whole).abs().max()) < 0.05
    model.loras.apply((*lora(models, 0.25), LoraUse(twin, -0.25)))
    off = latents(model)
    model.loras.apply(())
    assert type(layer_of(model)).__name__ == "Linear"
    assert float((latents(model) - off).abs().max()) < 0.05
