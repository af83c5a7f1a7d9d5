"""What decides a model's outputs beside its weights: configurations, sampler, tokenizer, templates.

Two models with equal weights and different schedulers or vocabularies say and show different things, so all
of this stands in the names under which outputs are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["configuration", "described", "key", "tokenizer_digest"]

BOOKKEEPING = frozenset({"architectures", "dtype", "torch_dtype", "transformers_version"})
"""Where a part comes from and how it was stored; also every key that begins with an underscore."""


def configuration(part: Any) -> dict[str, Any]:
    """Class and configuration of a library's object (scheduler, network), without bookkeeping."""
    config = getattr(part, "config", None) or {}
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    kept = {k: v for k, v in values.items() if not k.startswith("_") and k not in BOOKKEEPING}
    return {"class": type(part).__qualname__, **kept}


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of what a tokenizer makes of a text: vocabulary, merges, rules, special tokens, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        text = str(backend.to_str())
        # Truncation and padding stand before this; every call sets them anew.
        text = text[text.index('"added_tokens"') :]
    else:
        rules = list(getattr(tokenizer, "bpe_ranks", ()))
        text = repr((sorted(tokenizer.get_vocab().items()), rules))
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "model_max_length")
    record = {name: getattr(tokenizer, name, None) for name in (*names, "chat_template")}
    core = hashlib.sha256(text.encode()).hexdigest()
    return key({"class": type(tokenizer).__qualname__, "core": core, **record})


def described(part: Any) -> Any:
    """Whatever decides an output as plain values: a tokenizer, something with a configuration, a value."""
    if hasattr(part, "get_vocab"):
        return tokenizer_digest(part)
    return configuration(part) if hasattr(part, "config") else part


def key(record: Mapping[str, Any]) -> str:
    """A short text that names a record of plain values."""
    text = json.dumps(record, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return value.tolist() if hasattr(value, "tolist") else str(value)
