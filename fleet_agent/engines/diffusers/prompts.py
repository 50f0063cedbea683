"""Prompts to embeddings: any length, 75 tokens at a time, both encoders of SDXL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_ROOM = 2
"""Of a chunk's tokens: its beginning and its end."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """One prompt: (1, 77 x chunks, width) and (1, width of the second encoder)."""

    states: Any
    pooled: Any


def chunks_of(pipeline: Any, text: str) -> int:
    """How many chunks a prompt takes, at least one; the longer of both tokenizers' counts."""
    return max(_count(tokenizer, text) for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2))


def embed(pipeline: Any, text: str, chunks: int) -> Embedded:
    """The embeddings of a prompt in just so many chunks: what lacks is empty. Pooled is that of the first chunk."""
    import torch

    parts = []
    pooled = None
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        ids = torch.tensor(_ids(tokenizer, text, chunks), device=encoder.device)
        out = encoder(ids, output_hidden_states=True)
        # SDXL was trained on the last layer but one of each encoder.
        hidden = out.hidden_states[-2]
        parts.append(hidden.reshape(1, -1, hidden.shape[-1]))
        pooled = out[0][:1]
    return Embedded(torch.cat(parts, dim=-1), pooled)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)


def _size(tokenizer: Any) -> int:
    return int(tokenizer.model_max_length) - _ROOM


def _count(tokenizer: Any, text: str) -> int:
    return max(1, -(-len(_tokens(tokenizer, text)) // _size(tokenizer)))


def _ids(tokenizer: Any, text: str, chunks: int) -> list[list[int]]:
    tokens, size = _tokens(tokenizer, text), _size(tokenizer)
    # The second encoder of SDXL pads with token 0 ("!"), as its tokenizer says.
    pad = tokenizer.pad_token_id
    rows = []
    for index in range(chunks):
        part = tokens[index * size : (index + 1) * size]
        row = [tokenizer.bos_token_id, *part, tokenizer.eos_token_id]
        rows.append(row + [pad] * (size + _ROOM - len(row)))
    return rows
