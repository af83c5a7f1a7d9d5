"""Gated adapters at work: low-rank changes beside a denoiser's weights, weighed for each row by its text.

    y       = W x + sum_c gamma_c(p) s_c up_c (down_c x)
    gamma_c = factor max over phrases of max( sc_f, sc_t )
    sc_f    = cos( E(p), E(c) )                      all token rows of a text as one vector
    sc_t    = |T(c) and T(p)| / |T(c)|               sets of token ids, special tokens left out

``p`` is the text of a row, ``c`` a phrase of the edit, ``up (out, r)``, ``down (r, width)``, ``s = alpha / r``.  Each
row of a batch has its own gate.  A gate belongs to a prompt: the row of the unconditional branch of guidance takes
that of the prompt it stands beside.  Rows that no text is known for (embeddings from elsewhere) go by ``sc_f``
alone.  Rows of gate 0 are not touched at all, so their answers are those of the bare layers, bit for bit.

Source: SPM, arXiv 2312.16145 (facilitated transport).  ``doubled`` is what its published code does: all adapters
together answer ``(sum_c gamma_c s_c up_c) (sum_c gamma_c down_c) x``, so that one alone acts by the square of its gate
and several share cross terms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..edit import Edit, adapters
from ..edit.deltas import DOWN, UP
from ..edit.layers import layers as layers_of
from ..errors import MissingPart, UnsupportedModel
from ..method import Control
from ..models.diffusion import DiffusionModel
from ..models.types import Condition, Context
from .low_rank import thinned, widened

__all__ = ["SCORES", "Gate", "GatedAdapters", "features"]

SCORES = ("max", "feature", "token", "open")
"""What a gate goes by: both scores, one of them, or nothing (1 for every text)."""

WORDS_KEPT = 10_000
"""Texts whose token ids are remembered."""


def features(condition: Condition) -> Tensor:
    """The token rows of each text as one vector, float32 ``(n, tokens width)``; masked rows count as zeros."""
    rows = condition.embeddings.float()
    if condition.mask is not None:
        rows = rows * condition.mask.to(rows)[..., None]
    return rows.flatten(1)


@dataclasses.dataclass(frozen=True)
class Gate:
    """How far the adapters of one edit are open.

    Attributes:
        phrases: What was erased.
        score: One of ``SCORES``.
        factor: Times this.
    """

    phrases: tuple[str, ...]
    score: str = "max"
    factor: float = 1.0
    _words: dict[tuple[Any, str], frozenset[int]] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )

    def of(
        self, model: DiffusionModel, condition: Condition, conditional: Tensor | None = None
    ) -> Tensor:
        """``gamma`` of each row, float32 ``(rows,)`` on the condition's device.

        Args:
            model: Encodes the phrases and cuts texts into tokens, as it is now.
            condition: The rows.
            conditional: bool ``(rows,)``, ``False`` for rows of the unconditional branch; ``None`` outside guidance.

        Raises:
            UnsupportedModel: The two branches of guidance are not of one length.
        """
        own = self.factor * self._scores(model, condition)
        if conditional is None or bool(conditional.all()) or not bool(conditional.any()):
            return own
        flags = conditional.to(own.device)
        prompts = own[flags]
        if 2 * len(prompts) != len(own):
            raise UnsupportedModel(
                f"{len(own) - len(prompts)} unconditional rows beside {len(prompts)} prompts: a gate belongs to a "
                "prompt, so each needs one row of both branches"
            )
        paired = own.clone()
        paired[~flags] = prompts
        return paired

    def _scores(self, model: DiffusionModel, condition: Condition) -> Tensor:
        if self.score == "open":
            return torch.ones(condition.rows, device=condition.embeddings.device)
        if self.score == "feature":
            return self.feature(model, condition)
        found = self.token(model, condition).to(condition.embeddings.device)
        return found if self.score == "token" else found.maximum(self.feature(model, condition))

    def feature(self, model: DiffusionModel, condition: Condition) -> Tensor:
        """``sc_f``, the largest over phrases, ``(rows,)``; gradients reach the rows' embeddings."""
        with torch.no_grad():
            known = features(model.encode(list(self.phrases))).to(condition.embeddings.device)
        given = features(condition)
        # Rows from elsewhere may have another number of tokens; what one side lacks counts as zeros.
        short = known.shape[1] - given.shape[1]
        given, known = (
            functional.pad(given, (0, max(0, short))),
            functional.pad(known, (0, max(0, -short))),
        )
        cosines = functional.normalize(given, dim=1) @ functional.normalize(known, dim=1).T
        return cosines.amax(1)

    def token(self, model: DiffusionModel, condition: Condition) -> Tensor:
        """``sc_t``, the largest over phrases, ``(rows,)`` on the CPU; 0 for rows without a text."""
        length = condition.embeddings.shape[1]
        wanted = [w for w in (self._tokens(model, p, length) for p in self.phrases) if w]
        found = []
        for text in condition.texts or (None,) * condition.rows:
            said = frozenset() if text is None else self._tokens(model, text, length)
            found.append(max((len(w & said) / len(w) for w in wanted), default=0.0))
        return torch.tensor(found)

    def _tokens(self, model: DiffusionModel, text: str, length: int) -> frozenset[int]:
        """Token ids of a text as the first text encoder reads it, special ones left out."""
        own = next(iter(model.vocabularies().values()))
        cutter = own.tokenizer
        key = (cutter, text)
        if key not in self._words:
            if len(self._words) >= WORDS_KEPT:
                self._words.clear()
            room = min(length, cutter.model_max_length)
            made = cutter(own.prepared([text]), truncation=True, max_length=room).input_ids[0]
            self._words[key] = frozenset(made) - frozenset(cutter.all_special_ids)
        return self._words[key]


class GatedAdapters(Control):
    """The adapters of one edit, while it is on a model.

    Args:
        model: The model the edit is on.
        edit: An edit of kind ``gated-adapter``.
        gate: Its gate.
        doubled: As in the published code, see above.

    Raises:
        MissingPart: An adapter stands beside a weight that is neither of a linear layer nor of a convolution.
        UnsupportedModel: Doubled adapters of several ranks, whose sums have no meaning.
    """

    def __init__(
        self, model: DiffusionModel, edit: Edit, gate: Gate, *, doubled: bool = False
    ) -> None:
        self.model, self.edit, self.gate, self.doubled = model, edit, gate, doubled
        known = layers_of(model)
        self.modules: dict[str, Any] = {}
        self.names: dict[str, str] = {}
        for name in adapters.layers(edit):
            if not name.endswith(".weight") or known[name].kind not in ("linear", "convolution"):
                raise MissingPart(
                    f"{model.name}: {name} is not the weight of a linear layer or a convolution, so no adapter can "
                    "stand beside it"
                )
            layer = name.removesuffix(".weight")
            self.names[layer], self.modules[layer] = name, known[name].module
        self.layers: Sequence[str] = tuple(self.names)
        self._held: dict[Any, tuple[Tensor, Tensor]] = {}
        for other in self._peers(model.acting):
            for layer in self.names.keys() & other.names.keys():
                if self._rank(layer) != other._rank(layer):
                    raise UnsupportedModel(
                        f"{layer}: adapters of rank {other._rank(layer)} and {self._rank(layer)} cannot be summed "
                        "before they are multiplied, as compat='official' does; use one rank, or compat='paper'"
                    )

    def _rank(self, layer: str) -> int:
        return len(self.edit.tensors[DOWN + self.names[layer]])

    def _peers(self, acting: Sequence[Control]) -> list[GatedAdapters]:
        """The doubled adapters among what acts, this one's own included; none where this one is not."""
        found = [c for c in acting if isinstance(c, GatedAdapters) and c.doubled]
        return found if self.doubled else []

    def factors(self, layer: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """``s up (out, r)`` and ``down (r, width)`` of a layer, where and as precise as its input."""
        key = (layer, like.device, like.dtype)
        if key not in self._held:
            name = self.names[layer]
            up, down = self.edit.tensors[UP + name], self.edit.tensors[DOWN + name].flatten(1)
            scaled = adapters.scale(self.edit, name) * up
            self._held[key] = scaled.to(like), down.to(like)
        return self._held[key]

    def condition(self, context: Context, condition: Condition) -> Condition:
        """Sets the gates of this pass by what the rows ask for."""
        gates = self.gate.of(self.model, condition, context.conditional)
        flags = context.conditional
        prompts = gates if flags is None else gates[flags.to(gates.device)]
        context.memory[self] = gates, prompts
        return condition

    def gates(self, context: Context, rows: int) -> Tensor:
        """``gamma`` of each row of this pass; rows of further branches of guidance go by their prompts as well.

        Raises:
            UnsupportedModel: The layer that is running has rows of which nobody knows the prompt.
        """
        own, prompts = context.memory[self]
        times, left = divmod(rows - len(own), max(1, len(prompts)))
        if left or times < 0:
            raise UnsupportedModel(
                f"{context.layer} has {rows} rows where {len(own)} texts were given; gated adapters need a row a text"
            )
        return torch.cat([own, prompts.repeat(times)]) if times else own

    def activations(self, context: Context, hidden: Tensor) -> Tensor:
        """The layer's answer with this edit's share; of doubled ones the first adds the share of all."""
        layer = context.layer
        together = [c for c in self._peers(self.model.acting) if layer in c.names] or [self]
        if together[0] is not self:
            return hidden
        gates = torch.stack([c.gates(context, len(hidden)) for c in together]).to(hidden.device)
        rows = gates.ne(0).any(0).nonzero().flatten()
        if not len(rows):
            return hidden
        whole = len(rows) == len(hidden)
        given = context.inputs[0] if whole else context.inputs[0][rows]
        gates = gates if whole else gates[:, rows]
        change = self._change(layer, given, gates, together)
        return hidden + change if whole else hidden.index_add(0, rows, change.to(hidden.dtype))

    def _change(
        self, layer: str, given: Tensor, gates: Tensor, together: Sequence[GatedAdapters]
    ) -> Tensor:
        """What is added to the answers to ``given``, rows with the gates ``(adapters, rows)``."""
        module = self.modules[layer]
        weights = gates.to(given.dtype).reshape(len(together), -1, *(1,) * (given.ndim - 1))
        pairs = [c.factors(layer, given) for c in together]
        thin: Any = sum(
            w * thinned(module, given, down) for w, (_, down) in zip(weights, pairs, strict=True)
        )
        if not self.doubled:
            return widened(module, thin, pairs[0][0])
        made: Any = sum(
            w * widened(module, thin, up) for w, (up, _) in zip(weights, pairs, strict=True)
        )
        return made
