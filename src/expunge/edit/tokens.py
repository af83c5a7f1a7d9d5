"""New words of the text side: tokens that an edit brings, and the rows a text encoder shall read for them.

While they are on, the model has a copy of the tokenizer that knows the words, and a token table with their rows
appended.  Taking them off puts the very objects back that were there before, which nothing has written to.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import EditFormatError, MissingPart, NonFiniteError, WrongShape, WrongState, nearest

if TYPE_CHECKING:
    from ..models.base import Model
    from . import Edit
    from .manifest import Manifest

__all__ = ["PARTS", "PREFIX", "Vocabulary", "Words", "check_rows", "in_training", "tables"]

PREFIX = "tokens."
"""Rows of a text encoder's new tokens stand in the tensor ``tokens.<part>``, ``(k, width)``."""

PARTS: Mapping[str, str] = {
    "tokenizer": "text_encoder",
    "tokenizer_2": "text_encoder_2",
    "tokenizer_3": "text_encoder_3",
}
"""Tokenizer and the text encoder that reads its ids, by the names diffusers gives them."""

LEGACY_END = 2
"""CLIP encoders configured with this end token look for the largest id instead, which a new token would be."""

_count = itertools.count(1)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A tokenizer of a model, and who reads its ids.

    Attributes:
        owner, attribute: Where the tokenizer stands (a pipeline, ``tokenizer_2``).
        part: Name of the text encoder among the model's parts.
        encoder: The text encoder.
        prepared: Texts as the model writes them before they are cut into tokens.
    """

    owner: Any
    attribute: str
    part: str
    encoder: Any
    prepared: Callable[[Sequence[str]], list[str]] = list

    @property
    def tokenizer(self) -> Any:
        """The tokenizer as it is now."""
        return getattr(self.owner, self.attribute)


def check_rows(manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse rows that do not go with the manifest's token texts, one row a text."""
    wanted = {PREFIX + PARTS[name]: len(texts) for name, texts in manifest.tokens.items()}
    for name in sorted(n for n in {*tensors, *wanted} if n.startswith(PREFIX)):
        if name not in tensors:
            raise EditFormatError(f"{manifest.method}: the edit lacks the tensor {name!r}")
        if name not in wanted:
            raise EditFormatError(
                f"{manifest.method}: the edit holds {name!r} but names no tokens for it"
            )
        rows = tensors[name]
        if rows.ndim != 2 or len(rows) != wanted[name] or not rows.is_floating_point():
            raise EditFormatError(
                f"{manifest.method}: {name!r} is {rows.dtype} {tuple(rows.shape)}; needed is one row of numbers for "
                f"each of {wanted[name]} tokens"
            )


def vocabulary(model: Model, tokenizer: str) -> Vocabulary:
    """The vocabulary of a tokenizer.

    Raises:
        MissingPart: The model has no such tokenizer that takes new words.
    """
    known = model.vocabularies()
    if tokenizer not in known:
        raise MissingPart(
            f"{model.name}: the edit adds tokens to {tokenizer!r}, but the model has no text encoder of its own "
            f"behind a tokenizer of that name{nearest(tokenizer, known)}"
        )
    return known[tokenizer]


def tables(model: Model, tokenizers: Sequence[str]) -> list[str]:
    """Canonical names of the token tables behind tokenizers."""
    return [_table_name(model, vocabulary(model, name)) for name in tokenizers]


def _table_name(model: Model, own: Vocabulary) -> str:
    weight = own.encoder.get_input_embeddings().weight
    path = next(name for name, p in own.encoder.named_parameters() if p is weight)
    return f"{own.part}.{model.canonical(path)}"


@dataclasses.dataclass
class _Change:
    """An attribute or an entry of a mapping, with what stood there and what takes its place."""

    owner: Any
    key: str
    old: Any
    new: Any

    def put(self, value: Any) -> None:
        if isinstance(self.owner, dict):
            self.owner[self.key] = value
        else:
            setattr(self.owner, self.key, value)


class Words:
    """The tokens of one edit, built for a model as it is; nothing is touched before :meth:`on`.

    Args:
        model: The model; edits below this one are on it.
        edit: The edit.
        changed: New values of weights that the same edit changes, by canonical name.

    Attributes:
        replaced: Canonical name of each exchanged token table -> the parameter that stood there.
        mark: A number no other words have; it names the words in keys of remembered texts.

    Raises:
        MissingPart: The model has no such tokenizer.
        WrongState: A text is a token already, or would not stay in one piece.
        WrongShape: Rows of another width.
        NonFiniteError: Rows that the model's precision cannot hold.
    """

    def __init__(
        self, model: Model, edit: Edit, changed: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        self.mark = next(_count)
        self.replaced: dict[str, nn.Parameter] = {}
        self.first: dict[str, int] = {}
        self.modules: dict[str, list[nn.Module]] = {}
        self._changes: list[_Change] = []
        self._tables: list[tuple[nn.Parameter, nn.Parameter]] = []
        for attribute, texts in edit.manifest.tokens.items():
            own = vocabulary(model, attribute)
            larger, first = _with_words(own, texts, model.name)
            rows = edit.tensors[PREFIX + own.part]
            self._changes.append(_Change(own.owner, attribute, own.tokenizer, larger))
            self._extend(model, own, rows, first, changed or {})

    def _extend(
        self,
        model: Model,
        own: Vocabulary,
        rows: torch.Tensor,
        first: int,
        changed: Mapping[str, torch.Tensor],
    ) -> None:
        name, old = _table_name(model, own), own.encoder.get_input_embeddings().weight
        if rows.shape[1] != old.shape[1]:
            raise WrongShape(
                f"{name}: the rows of the edit's tokens are {rows.shape[1]} wide, the model's {old.shape[1]}"
            )
        with torch.no_grad():
            # Some tables have spare rows behind the tokenizer's last id; the new words take those first.
            size = max(len(old), first + len(rows))
            value = old.new_zeros(size, old.shape[1])
            value[: len(old)] = changed.get(name, old.detach())
            value[first : first + len(rows)] = rows.to(old.device, old.dtype)
        if not torch.isfinite(value[first : first + len(rows)]).all():
            raise NonFiniteError(
                f"{name}: rows of the edit's tokens are NaN or infinity in {old.dtype}"
            )
        weight = nn.Parameter(value, requires_grad=False)
        # A module that shares the table (T5 has it under two names) is exchanged once, wherever it stands.
        twins: dict[nn.Module, nn.Module] = {}
        for parent in own.encoder.modules():
            for key, child in parent._modules.items():
                if getattr(child, "weight", None) is old and isinstance(child, nn.Embedding):
                    if child not in twins:
                        twins[child] = _twin(child, weight)
                    self._changes.append(_Change(parent._modules, key, child, twins[child]))
        self.first[own.part], self.modules[own.part] = first, list(twins.values())
        self.replaced[name] = old
        self._tables.append((old, weight))
        self._changes += _settings(own, size)

    def on(self) -> None:
        """Put the larger tokenizers and tables in place."""
        for old, new in self._tables:
            _follow(new, old)
        for change in self._changes:
            change.put(change.new)

    def off(self) -> None:
        """Put back what stood there."""
        for old, new in self._tables:
            _follow(old, new)
        for change in reversed(self._changes):
            change.put(change.old)


def _follow(absent: nn.Parameter, present: nn.Parameter) -> None:
    """Where a model was moved or cast meanwhile, the table that was not part of it comes along."""
    if (absent.device, absent.dtype) != (present.device, present.dtype):
        absent.data = absent.data.to(present.device, present.dtype)


def _with_words(own: Vocabulary, texts: Sequence[str], model: str) -> tuple[Any, int]:
    """A copy of the tokenizer that knows the texts as single tokens, and the id of the first."""
    before, where = own.tokenizer, f"{model}: the {own.attribute}"
    known = before.get_vocab()
    for text, ids in zip(
        texts, before(list(texts), add_special_tokens=False).input_ids, strict=True
    ):
        if text in known or (len(ids) == 1 and ids[0] != before.unk_token_id):
            raise WrongState(
                f"{where} has the token {text!r} already; a new token needs a new name"
            )
    larger = copy.deepcopy(before)
    first = len(larger)
    larger.add_tokens(list(texts))
    inside = own.prepared([f"a {text} a" for text in texts])
    alone = larger(list(texts), add_special_tokens=False).input_ids
    amid = larger(inside, add_special_tokens=False).input_ids
    for index, text in enumerate(texts):
        if alone[index] != [first + index] or amid[index].count(first + index) != 1:
            raise WrongState(
                f"{where} does not keep the token {text!r} in one piece, or takes it for another one; "
                "allowed are texts such as '<word-1>'"
            )
    return larger, first


def _twin(module: nn.Embedding, weight: nn.Parameter) -> nn.Module:
    """The same module around another table: class, buffers and hooks stay, and so do scales of subclasses."""
    twin = copy.copy(module)
    twin._parameters = {**module._parameters, "weight": weight}
    twin.num_embeddings = len(weight)
    return twin


def _settings(own: Vocabulary, size: int) -> list[_Change]:
    """What of an encoder's configuration follows, so that a folder saved now opens again."""
    config, end = own.encoder.config, own.tokenizer.eos_token_id
    found = [_Change(config, "vocab_size", config.vocab_size, size)]
    if end is not None and end != LEGACY_END:
        # For all old texts both ways of finding the end give the same place.
        holders = [m for m in own.encoder.modules() if "eos_token_id" in vars(m)]
        for holder in [config, *holders] if holders else []:
            if holder.eos_token_id == LEGACY_END:
                found.append(_Change(holder, "eos_token_id", LEGACY_END, end))
    return found


@contextlib.contextmanager
def in_training(model: Model, edit: Edit, rows: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """For methods that learn rows: inside the block the tokens of ``edit`` have ``rows``, and gradients reach them.

    Args:
        model: With ``edit`` on it (rows of any values); nothing of a text is remembered in the block.
        edit: The edit that brings the tokens.
        rows: Text encoder part -> ``(k, width)`` in any precision.  They may change between passes.
    """
    words = model.edits.words_of(edit)
    handles = []

    def hook(part: str) -> Callable[..., torch.Tensor]:
        def spliced(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            own, ids = rows[part], args[0]
            index = (ids - words.first[part]).clamp(0, len(own) - 1)
            new = (ids >= words.first[part]) & (ids < words.first[part] + len(own))
            fresh = own.to(out.device, out.dtype)[index] * getattr(module, "embed_scale", 1.0)
            return torch.where(new[..., None], fresh, out)

        return spliced

    was, model.edits.training = model.edits.training, True
    try:
        for part in rows:
            handles += [m.register_forward_hook(hook(part)) for m in words.modules[part]]
        yield
    finally:
        model.edits.training = was
        for handle in handles:
            handle.remove()
