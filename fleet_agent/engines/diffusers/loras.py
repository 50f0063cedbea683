"""LoRAs of one model in memory: put on and taken off exactly."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from fleet_agent.engines.base import EngineError, LoraUse, ModelFile
from fleet_agent.engines.diffusers.reading import short

Weights = tuple[tuple[str, float], ...]


class Loras:
    """The LoRAs beside a model. `dtype` is what the UNet computes in where its weights are kept in another, or None."""

    def __init__(self, model: str, pipeline: Any, dtype: Any) -> None:
        self._model = model
        self._pipeline = pipeline
        self._dtype = dtype
        self._adapters: dict[str, tuple[str, str | None]] = {}
        self._weights: Weights = ()
        self._added = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Those in memory, sorted."""
        return tuple(sorted(self._adapters))

    def have(self, uses: Sequence[LoraUse]) -> None:
        """Has the LoRAs of `uses` in memory, and no other. Raises EngineError naming the file."""
        wanted = {use.file.name: use.file for use in uses}
        gone = [
            name for name, (_, sha256) in self._adapters.items() if name not in wanted or wanted[name].sha256 != sha256
        ]
        if gone:
            self._put(())
            for name in gone:
                self._pipeline.delete_adapters(self._adapters.pop(name)[0])
            self._tidy()
        for name, file in sorted(wanted.items()):
            if name not in self._adapters:
                self._add(name, file)

    def apply(self, uses: Sequence[LoraUse]) -> None:
        """Puts these weights in force; a weight of 0 is as if the LoRA was not there."""
        self.have(uses)
        self._put(tuple(sorted((use.file.name, use.weight) for use in uses if use.weight)))

    def _put(self, weights: Weights) -> None:
        if weights == self._weights and (weights or not self._adapters):
            return
        if weights:
            self._pipeline.enable_lora()
            names = [self._adapters[name][0] for name, _ in weights]
            self._pipeline.set_adapters(names, [weight for _, weight in weights])
        elif self._adapters:
            self._pipeline.disable_lora()
        self._weights = weights

    def _add(self, name: str, file: ModelFile) -> None:
        if file.path is None or not file.path.is_file():
            raise EngineError("LORA_NOT_FOUND", f"LoRA {name} is no longer on this node", retryable=True)
        self._added += 1
        adapter = f"lora_{self._added}"
        try:
            self._load(file, adapter)
        except BaseException as error:
            # What it had put on by then would be in every picture from now on.
            with contextlib.suppress(Exception):
                self._pipeline.delete_adapters(adapter)
            self._tidy()
            if isinstance(error, OSError | ValueError | KeyError | RuntimeError) and not _is_memory(error):
                raise EngineError("ENGINE_FAILED", f"{name} is no LoRA for {self._model}: {short(error)}") from error
            raise
        self._adapters[name] = (adapter, file.sha256)

    def _load(self, file: ModelFile, adapter: str) -> None:
        assert file.path is not None
        where = {"weight_name": file.path.name, "local_files_only": True}
        self._pipeline.load_lora_weights(str(file.path.parent), adapter_name=adapter, **where)
        if not any(adapter in adapters for adapters in self._pipeline.get_list_adapters().values()):
            raise ValueError("nothing in it is for a part of this model")
        if self._dtype is not None:
            self._restore(str(file.path.parent), where, adapter)

    def _restore(self, folder: str, where: dict[str, Any], adapter: str) -> None:
        """A LoRA takes the type of the weights that it is put on, which is too little if they are only kept in it."""
        from diffusers.utils import convert_unet_state_dict_to_peft

        unet = self._pipeline.unet
        state, *_ = self._pipeline.lora_state_dict(folder, unet_config=unet.config, **where)
        own = {key.removeprefix("unet."): value for key, value in state.items() if key.startswith("unet.")}
        exact = convert_unet_state_dict_to_peft(own)
        for name, module in unet.named_modules():
            for part in ("lora_A", "lora_B"):
                layers = getattr(module, part, {})
                if adapter in layers:
                    weight = layers[adapter].weight
                    value = exact.get(f"{name}.{part}.weight", weight.data)
                    weight.data = value.to(weight.device, self._dtype)

    def _tidy(self) -> None:
        if not self._adapters:
            # Without any the layers are what they were before the first came, bit for bit.
            self._pipeline.unload_lora_weights()


def _is_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError)
