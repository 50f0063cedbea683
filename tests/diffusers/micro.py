"""A Stable Diffusion XL of 4 MB with SDXL's own topology and random weights: as a folder, as one file, with a LoRA."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

MODEL = "micro"
ONE_FILE = "SDXL_micro.safetensors"
LORA = "ink.safetensors"
_MERGES = (("t", "h"), ("th", "e</w>"))


def make(models: Path) -> None:
    """Fills a model folder: checkpoints/micro, checkpoints/SDXL_micro.safetensors with its layout, loras/ink."""
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    checkpoints, loras = models / "checkpoints", models / "loras"
    checkpoints.mkdir(parents=True)
    loras.mkdir()
    words = _words()

    def text(width: int) -> Any:
        return CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=width * 2,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=77,
            projection_dim=width,
            bos_token_id=len(words) - 2,
            eos_token_id=len(words) - 1,
            pad_token_id=len(words) - 1,
        )

    down = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        down_block_types=down,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=(2, 2, 2),
        use_linear_projection=True,
        # The widths of both encoders together; they must differ, or a single file's second one is not found.
        cross_attention_dim=96,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + 64,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=512,
        force_upcast=False,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    tokenizer = _tokenizer(models / "tokenizer", words)
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text(32)),
        text_encoder_2=CLIPTextModelWithProjection(text(64)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipeline.save_pretrained(checkpoints / MODEL, safe_serialization=True)
    _save_one_file(pipeline, checkpoints / ONE_FILE)
    # What a single file lacks, configs and tokenizers, lies in the folder of its name.
    (checkpoints / ONE_FILE).with_suffix("").symlink_to(checkpoints / MODEL)
    _save_lora(unet, loras / LORA)


def _words() -> list[str]:
    """A vocabulary of bytes, as CLIP's byte-level BPE spells them, and one word."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    letters = [chr(byte) for byte in kept] + [chr(256 + index) for index in range(len(others))]
    merged = ["".join(pair) for pair in _MERGES]
    return [*letters, *(letter + "</w>" for letter in letters), *merged, "<|startoftext|>", "<|endoftext|>"]


def _tokenizer(folder: Path, words: list[str]) -> Any:
    from transformers import CLIPTokenizer

    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in _MERGES), ""]))
    config = {
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


def _save_lora(unet: Any, path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name, module in unet.named_modules():
        if name.endswith(("to_q", "to_k", "to_v")):
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(4, module.in_features) * 0.5
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, 4) * 0.5
    save_file(tensors, path, metadata={"architecture": "sdxl", "trigger_words": "ink"})


# The names of diffusers on the left, of an original SDXL checkpoint on the right.
_BLOCKS = [
    ("mid_block.attentions.0.", "middle_block.1."),
    ("mid_block.resnets.0.", "middle_block.0."),
    ("mid_block.resnets.1.", "middle_block.2."),
]
for _block in range(3):
    for _layer in range(2):
        _place = 3 * _block + _layer + 1
        _BLOCKS.append((f"down_blocks.{_block}.resnets.{_layer}.", f"input_blocks.{_place}.0."))
        _BLOCKS.append((f"down_blocks.{_block}.attentions.{_layer}.", f"input_blocks.{_place}.1."))
    for _layer in range(3):
        _place = 3 * _block + _layer
        _BLOCKS.append((f"up_blocks.{_block}.resnets.{_layer}.", f"output_blocks.{_place}.0."))
        _BLOCKS.append((f"up_blocks.{_block}.attentions.{_layer}.", f"output_blocks.{_place}.1."))
    _BLOCKS.append((f"down_blocks.{_block}.downsamplers.0.conv.", f"input_blocks.{3 * _block + 3}.0.op."))
    _BLOCKS.append((f"up_blocks.{_block}.upsamplers.0.", f"output_blocks.{3 * _block + 2}.{2 if _block < 2 else 1}."))
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_ENCODER_2 = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def _save_one_file(pipeline: Any, path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"model.diffusion_model." + _unet_name(k): v for k, v in pipeline.unet.state_dict().items()}
    for key, value in pipeline.vae.state_dict().items():
        name = _vae_name(key)
        flat = re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.weight", name) is not None
        tensors["first_stage_model." + name] = value[:, :, None, None] if flat else value
    for key, value in pipeline.text_encoder.state_dict().items():
        bare = key.removeprefix("text_model.")
        tensors["conditioner.embedders.0.transformer.text_model." + bare] = value
    tensors |= _encoder_2(pipeline.text_encoder_2.state_dict())
    save_file({key: value.contiguous().half() for key, value in tensors.items()}, path)


def _unet_name(key: str) -> str:
    before, _, leaf = key.rpartition(".")
    if before in _TOP:
        return f"{_TOP[before]}.{leaf}"
    if "resnets" in key:
        for ours, theirs in _RESNET.items():
            key = key.replace(f".{ours}.", f".{theirs}.")
    ours, theirs = next(pair for pair in _BLOCKS if key.startswith(pair[0]))
    return theirs + key[len(ours) :]


def _vae_name(key: str) -> str:
    key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    key = key.replace("mid_block.attentions.0.", "mid.attn_1.")
    if "mid.attn_1." in key:
        for ours, theirs in _ATTENTION.items():
            key = key.replace(ours, theirs)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = re.sub(r"encoder\.down_blocks\.(\d)\.resnets\.", r"encoder.down.\1.block.", key)
    key = re.sub(r"encoder\.down_blocks\.(\d)\.downsamplers\.0\.", r"encoder.down.\1.downsample.", key)
    key = re.sub(r"decoder\.up_blocks\.(\d)\.resnets\.", lambda m: f"decoder.up.{3 - int(m[1])}.block.", key)
    return re.sub(r"decoder\.up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"decoder.up.{3 - int(m[1])}.upsample.", key)


def _encoder_2(state: dict[str, Any]) -> dict[str, Any]:
    import torch

    names = {key.removeprefix("text_model."): value for key, value in state.items()}
    out = "conditioner.embedders.1.model."
    found = {}
    for key, value in names.items():
        leaf = key.rpartition(".")[2]
        if key == "text_projection.weight":
            found[out + "text_projection"] = value.T
        elif key == "embeddings.token_embedding.weight":
            found[out + "token_embedding.weight"] = value
        elif key == "embeddings.position_embedding.weight":
            found[out + "positional_embedding"] = value
        elif key.startswith("final_layer_norm"):
            found[out + f"ln_final.{leaf}"] = value
        elif ".self_attn.q_proj." in key:
            layer = key.split(".self_attn.")[0]
            parts = [names[f"{layer}.self_attn.{one}_proj.{leaf}"] for one in "qkv"]
            number = layer.rpartition(".")[2]
            found[f"{out}transformer.resblocks.{number}.attn.in_proj_{leaf}"] = torch.cat(parts)
        elif ".self_attn.k_proj." not in key and ".self_attn.v_proj." not in key:
            number, rest = key.removeprefix("encoder.layers.").split(".", 1)
            for ours, theirs in _ENCODER_2.items():
                rest = rest.replace(ours, theirs)
            found[f"{out}transformer.resblocks.{number}.{rest}"] = value
    return found
