"""Texts whose condition is kept, so that no text is encoded twice by the same weights and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .hidden_states import listeners, showing
from .types import Condition, Context

if TYPE_CHECKING:
    from .diffusion import DiffusionModel

__all__ = ["RememberedTexts"]

REMEMBERED_TEXTS, REMEMBERED_BYTES = 20_000, 2**31
"""Texts whose condition is kept, and the memory they may take; rows of a T5 are megabytes each."""


class RememberedTexts:
    """The conditions of texts, one row each, by text and by what encoded them."""

    def __init__(self) -> None:
        self._texts: dict[tuple[str, Any], Condition] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def encode(
        self, model: DiffusionModel, texts: Sequence[str], *, shown: bool = True
    ) -> Condition:
        """The condition of texts, ``n`` rows; remembered while no gradient is asked for.

        Args:
            model: Whose text encoders are asked.
            texts: ``n`` texts.
            shown: Controls are shown hidden states of the text encoders.  A text that they leave as it was has
                the very condition it has without them, so its pictures are the same bit for bit.
        """
        towers = [part for name, part in model.parts().items() if name.startswith("text_encoder")]
        parameters = [p for tower in towers for p in tower.parameters()]
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        heard = listeners(model.acting, model.layout.towers) if shown else ()
        known = {id(control): digest for digest, control in model.edits.acting.items()}
        if learning or model.edits.training or not known.keys() >= set(map(id, heard)):
            # A user's control is code with state of its own: what it makes has no name.
            with showing(model.layout.encoders(), heard, Context()):
                return model.layout.encode(texts)
        # In-place changes of weights (edits, training) raise the version counters, so a remembered
        # embedding is never served for other weights; nor after a move to another device or precision, nor
        # for other tokens, whose tables are other objects with counters of their own.  A training loop that
        # shows its teacher exchanges storages, which raises no counter: hence their addresses.
        stored = hash(tuple(p.data_ptr() for p in parameters))
        where = {(p.device, p.dtype) for tower in towers for p in [next(tower.parameters())]}
        plain = (sum(p._version for p in parameters), stored, frozenset(where), model.edits.marks)
        version = (*plain, *(known[id(control)] for control in heard))
        missing = [text for text in dict.fromkeys(texts) if (text, version) not in self._texts]
        if len(self._texts) + len(missing) > self._room():
            self._texts.clear()
            missing = list(dict.fromkeys(texts))
        with torch.no_grad():
            for first in range(0, len(missing), model.layout.batch):
                part, context = missing[first : first + model.layout.batch], Context()
                with showing(model.layout.encoders(), heard, context):
                    made = model.layout.encode(part)
                for index, text in enumerate(part):
                    own = made.select(slice(index, index + 1)).map(torch.clone)
                    if context.changed is None or not bool(context.changed[index]):
                        own = self._texts.setdefault((text, plain), own)
                    self._texts[text, version] = own
        return Condition.concatenate([self._texts[text, version] for text in texts])

    def _room(self) -> int:
        """How many texts may be remembered, by the size of one that is."""
        one = next(iter(self._texts.values()), None)
        size = 0 if one is None else one.embeddings.numel() * one.embeddings.element_size()
        return min(REMEMBERED_TEXTS, REMEMBERED_BYTES // max(size, 1))
