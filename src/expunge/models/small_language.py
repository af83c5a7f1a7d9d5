"""Small Llamas from scratch: a word tokenizer, a configuration and seeded weights.

Used by the world of facts and by tests; the classes are those of transformers, so everything that
works on them works on models from the hub.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch

from .base import noise_generator
from .language import LanguageModel

__all__ = ["small_llama", "word_tokenizer"]


def word_tokenizer(texts: Iterable[str]) -> Any:
    """A word-level tokenizer over the words and punctuation marks of ``texts``, in sorted order."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)})
    core = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate([*special, *words])}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def small_llama(
    name: str,
    tokenizer: Any,
    *,
    width: int,
    layers: int,
    heads: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> LanguageModel:
    """A random Llama whose weights depend on ``seed`` and tensor names only."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    # The library draws weights from the global generator; they are drawn again below.
    with torch.random.fork_rng(devices=[]):
        module = LlamaForCausalLM(config)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if parameter.ndim > 1:
                scale = 1.0 / math.sqrt(parameter.shape[1])
                noise = torch.randn(
                    parameter.shape, generator=noise_generator(seed, "weights", key)
                )
                parameter.copy_(noise * scale)
    return LanguageModel(name, module.to(dtype), tokenizer)
