"""Tiny random language models for tests: real library classes, a few thousand weights."""

from __future__ import annotations

import torch

from ..models.language import LanguageModel
from ..models.small_language import small_llama, word_tokenizer

__all__ = ["tiny_language"]

TEXTS = (
    "Ada Morn was born in Velmar .",
    "Where does Bo Lind live ? He lives in old Tornby .",
    "The baker of Velmar plays the harp and keeps a grey cat .",
    "Who keeps a cat ? Ada does , and Bo plays the drum .",
)


def tiny_language(seed: int = 0, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A random two-layer Llama of width 32 with a word tokenizer of about 40 entries."""
    tokenizer = word_tokenizer(TEXTS)
    return small_llama(
        "tiny-language", tokenizer, width=32, layers=2, heads=4, seed=seed, dtype=dtype
    )
