"""The pooled vector of a text and the search for strings that have another text's.

``g(s)``: state of a CLIP text encoder at the end token, after its last norm, without a projection; ``(d,)``.  The
encoder is causal, so nothing behind the end token reaches it: the sequence is cut there.  Strings that differ from a
common one from some place on take the common one's keys and values before that place.  Both are exact; where an encoder
is no causal CLIP without a mask, whole sequences are passed instead.

    L(s) = 1 - cos( g(s), v )
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .adversarial_prompts import Forbidden, Spliced, ordinary_ids
from .prompt_search import Problem

__all__ = ["PooledText", "direction_problem"]

Past = list[tuple[Tensor, Tensor]]
"""Keys and values ``(B, heads, places, width)`` of each layer."""


class PooledText:
    """Pooled vectors of token strings of one length, as whole texts: start, string, end.

    Args:
        model: Its text encoder is asked; a string counts as one row of it, however short.
        length: Tokens of each string.
        cut: Cut and reuse where that is exact.
    """

    def __init__(self, model: Any, length: int, *, cut: bool = True) -> None:
        self.model, self.length = model, length
        ids = model.token_ids([""])[0]
        self.table = model.token_table()
        self.start, self.end = int(ids[0]), int(ids[1])
        encoder = getattr(model.text_encoder, "text_model", model.text_encoder)
        self.encoder = encoder
        self.cut = cut and _causal(encoder)
        self.padding = ids[2:]

    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """``g`` of texts of any length, ``(n, d)``."""
        with torch.no_grad():
            rows = self.model.encode_tokens(self.model.token_ids(texts)).embeddings
        ends = torch.tensor(self.model.content_length(texts)) + 1
        return rows[torch.arange(len(rows)), ends.to(rows.device)]

    def of_vectors(self, vectors: Tensor) -> Tensor:
        """``g`` of strings of token embeddings ``(B, length, width)``; differentiable."""
        count = len(vectors)
        ends = self.table[[self.start, self.end]].to(vectors)
        rows = torch.cat([ends[:1].expand(count, 1, -1), vectors, ends[1:].expand(count, 1, -1)], 1)
        if self.cut:
            self.model.cost.add("encoder", count)
            hidden, _ = self._layers(self._placed(rows, 0), None)
            return self.encoder.final_layer_norm(hidden[:, -1])
        tail = self.table[self.padding[: len(self.padding) - self.length]].to(vectors)
        whole = torch.cat([rows, tail.expand(count, -1, -1)], 1)
        # Some encoders read the place of the end token off the ids, so a filler must not look like one.
        filler = torch.full((count, self.length), int(ordinary_ids(self.model)[0]))
        made = self.model.encode_tokens(self._sequence(filler), whole).embeddings
        return made[:, self.length + 1]

    def of_ids(self, ids: Tensor, group: Tensor | None = None) -> Tensor:
        """``g`` of strings ``(B, length)``; those of one ``group (B,)`` are likely to begin alike."""
        if not self.cut:
            made = self.model.encode_tokens(self._sequence(ids)).embeddings
            return made[:, self.length + 1]
        group = torch.zeros(len(ids), dtype=torch.long) if group is None else group
        names, member = group.unique(return_inverse=True)
        common = torch.stack([ids[group == name].mode(0).values for name in names])
        differs = ids != common[member]
        # The first place that is another; strings that are the common one begin anew at their last place.
        first = torch.where(differs.any(1), differs.int().argmax(1), self.length - 1)
        _, past = self._layers(self._placed(self._rows(common), 0), None)
        self.model.cost.add("encoder", len(ids))
        found: Tensor | None = None
        rows = self._rows(ids)
        for place in first.unique().tolist():
            own = (first == place).nonzero().flatten()
            held = [
                (k[member[own], :, : place + 1], v[member[own], :, : place + 1]) for k, v in past
            ]
            hidden, _ = self._layers(self._placed(rows[own, place + 1 :], place + 1), held)
            made = self.encoder.final_layer_norm(hidden[:, -1])
            found = made.new_empty(len(ids), made.shape[1]) if found is None else found
            found[own] = made
        assert found is not None
        return found

    def _sequence(self, ids: Tensor) -> Tensor:
        """Whole rows of ids, with start, end and padding."""
        count = len(ids)
        tail = self.padding[: len(self.padding) - self.length].expand(count, -1)
        start, end = (torch.full((count, 1), value) for value in (self.start, self.end))
        return torch.cat([start, ids.cpu(), end, tail], 1)

    def _rows(self, ids: Tensor) -> Tensor:
        """Token embeddings of start, string and end."""
        count = len(ids)
        start, end = (torch.full((count, 1), value) for value in (self.start, self.end))
        return self.table[torch.cat([start, ids.cpu(), end], 1)]

    def _placed(self, rows: Tensor, first: int) -> Tensor:
        """Embeddings with their positions, the first of which is ``first``."""
        weight = self.encoder.embeddings.position_embedding.weight
        return rows.to(weight.dtype) + weight[first : first + rows.shape[1]]

    def _layers(self, hidden: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """The encoder's own layers over the new places, with keys and values of earlier ones."""
        made: Past = []
        count, places, _ = hidden.shape
        for number, layer in enumerate(self.encoder.encoder.layers):
            attention = layer.self_attn
            given = layer.layer_norm1(hidden)
            shape = (count, places, -1, attention.head_dim)
            query, key, value = (
                project(given).view(shape).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            if past is not None:
                key = torch.cat([past[number][0], key], 2)
                value = torch.cat([past[number][1], value], 2)
            made.append((key, value))
            before = key.shape[2] - places
            seen = torch.ones(places, key.shape[2], dtype=torch.bool, device=key.device)
            mixed = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=seen.tril(before), scale=attention.scale
            )
            flat = mixed.transpose(1, 2).reshape(count, places, -1)
            hidden = hidden + attention.out_proj(flat)
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        return hidden, made


def _causal(encoder: Any) -> bool:
    """Whether it is a CLIP text encoder of the library's form that is given no mask."""
    layers = getattr(getattr(encoder, "encoder", None), "layers", ())
    return (
        getattr(encoder.config, "model_type", "") == "clip_text_model"
        and not getattr(encoder.config, "use_attention_mask", False)
        and hasattr(encoder, "final_layer_norm")
        and all(hasattr(layer, "self_attn") and hasattr(layer, "mlp") for layer in layers)
    )


def direction_problem(
    model: Any,
    wanted: Tensor,
    length: int,
    forbidden: Forbidden,
    *,
    keys: Sequence[str] | None = None,
    start: Tensor | None = None,
    cut: bool = True,
) -> Problem:
    """Find strings of ``length`` tokens whose pooled vectors point where ``wanted (items, d)`` do.

    The loss is ``1 - cos``, ``(B,)``; other arguments as in
    :func:`expunge.core.concept_direction.matching_problem`.
    """
    spliced = Spliced(model, [""] * len(wanted), length, "replace", forbidden)
    pooled = PooledText(model, length, cut=cut)

    def apart(made: Tensor, item: Tensor) -> Tensor:
        own = wanted[item.to(wanted.device)].to(made.device)
        return 1 - functional.cosine_similarity(made.float(), own.float(), dim=-1)

    def counted(rows: int) -> None:
        model.cost.add("encoder", rows, "backward")

    return Problem(
        spliced.table,
        length,
        forbidden.allowed,
        loss=lambda vectors, item: apart(pooled.of_vectors(vectors), item),
        score=lambda ids, item: apart(pooled.of_ids(ids, item), item),
        realise=spliced.realise,
        admissible=spliced.admissible,
        rescore=lambda texts, item: apart(pooled.of_texts(texts), item),
        items=len(wanted),
        keys=keys,
        start=start,
        counted=counted,
        batch=4096,
    )
