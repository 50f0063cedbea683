"""Makes a language model and a speech model of a few thousand random weights, in the layout of a model cache."""

from __future__ import annotations

import io
import math
import struct
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

LANGUAGE, SPEECH = "fleet/micro-llm", "fleet/micro-whisper"
_REVISION = "0" * 40
_SPEECH_WORDS = (
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|transcribe|>",
    "<|translate|>",
    "<|notimestamps|>",
)


def tone() -> bytes:
    """Half a second of sound, a WAV."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16000)
        out.writeframes(b"".join(struct.pack("<h", int(8000 * math.sin(n / 20))) for n in range(8000)))
    return file.getvalue()


def make(home: Path) -> None:
    """Both models under `home`, as HF_HOME."""
    import torch
    from transformers import logging

    logging.set_verbosity_error()
    torch.manual_seed(1)
    _keep(home, LANGUAGE, _language)
    _keep(home, SPEECH, _speech)


def _keep(home: Path, name: str, save: Callable[[Path], None]) -> None:
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / _REVISION
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(_REVISION)
    save(folder)


def _tokenizer(special: tuple[str, ...]) -> tuple[Any, dict[str, int]]:
    """One token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, vocabulary


def _language(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer, vocabulary = _tokenizer(("<s>", "</s>", "<pad>"))
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    whole.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    whole.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=vocabulary["<s>"],
        # A text is as long as it may be.
        eos_token_id=None,
        pad_token_id=vocabulary["<pad>"],
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def _speech(folder: Path) -> None:
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizerFast,
    )

    tokenizer, vocabulary = _tokenizer(_SPEECH_WORDS)
    words = WhisperTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    words.add_special_tokens({"additional_special_tokens": list(_SPEECH_WORDS[1:])})
    WhisperProcessor(WhisperFeatureExtractor(feature_size=80), words).save_pretrained(folder)
    end = vocabulary["<|endoftext|>"]
    config = WhisperConfig(
        vocab_size=len(vocabulary),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_target_positions=64,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=vocabulary["<|startoftranscript|>"],
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config.max_length = 16
    model.save_pretrained(folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
