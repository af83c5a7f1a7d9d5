"""Records that methods and adapters exchange: Condition, Prediction, Context, and the text rows of matrices.

A row is one element of a batch.  Methods never know a context length, a width or what a network
predicts; they read these records.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import UnsupportedModel

__all__ = ["Condition", "Context", "Prediction", "PredictionKind", "Segment", "TextInput"]

PredictionKind = Literal["epsilon", "v", "x0", "flow"]


@dataclasses.dataclass(frozen=True)
class Condition:
    """What ``n`` rows are conditioned on.

    Attributes:
        embeddings: Text embeddings ``(n, tokens, width)``.
        mask: ``(n, tokens)``, 1 where attended, or ``None`` where the pipeline uses no mask.
        pooled: Pooled text vectors ``(n, pooled width)``, or ``None``.
        extra: Further row-wise tensors by name (time ids, image embeddings, class labels).
        texts: The text each row was encoded from; ``None``, for all or for a row, where it stands for no text.
    """

    embeddings: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    extra: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    texts: tuple[str | None, ...] | None = None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.embeddings.shape[0])

    def map(self, function: Any) -> Condition:
        """The condition with ``function`` applied to every tensor; which texts the rows then are is not known."""
        return Condition(
            function(self.embeddings),
            None if self.mask is None else function(self.mask),
            None if self.pooled is None else function(self.pooled),
            {name: function(value) for name, value in self.extra.items()},
        )

    def select(self, index: Any) -> Condition:
        """Rows by slice, list or index tensor."""
        texts = self.texts
        if texts is not None:
            own = index.cpu() if isinstance(index, Tensor) else index
            texts = tuple(texts[i] for i in torch.arange(len(texts))[own].reshape(-1).tolist())
        return dataclasses.replace(self.map(lambda tensor: tensor[index]), texts=texts)

    def repeat(self, times: int) -> Condition:
        """Each row ``times`` times in a row: rows 0, 0, ..., 1, 1, ..."""
        texts = self.texts and tuple(text for text in self.texts for _ in range(times))
        made = self.map(lambda tensor: tensor.repeat_interleave(times, 0))
        return dataclasses.replace(made, texts=texts)

    def detach(self) -> Condition:
        """Without gradient history."""
        return dataclasses.replace(self.map(lambda tensor: tensor.detach()), texts=self.texts)

    def with_embeddings(self, embeddings: Tensor) -> Condition:
        """The same condition with other text embeddings, which stand for no text."""
        return dataclasses.replace(self, embeddings=embeddings, texts=None)

    @staticmethod
    def concatenate(parts: Sequence[Condition]) -> Condition:
        """Rows of several conditions of one layout, one after another."""
        first = parts[0]
        for part in parts:
            if part.extra.keys() != first.extra.keys():
                # Else what the first part lacks would be lost without a word.
                raise UnsupportedModel(
                    f"rows with {sorted(first.extra)} beside text cannot be put together with rows with "
                    f"{sorted(part.extra)}; all need the same"
                )
        texts: tuple[str | None, ...] | None = None
        if any(part.texts is not None for part in parts):
            texts = tuple(t for part in parts for t in part.texts or (None,) * part.rows)
        return Condition(
            torch.cat([p.embeddings for p in parts]),
            None
            if first.mask is None
            else torch.cat([p.mask for p in parts if p.mask is not None]),
            None
            if first.pooled is None
            else torch.cat([p.pooled for p in parts if p.pooled is not None]),
            {name: torch.cat([p.extra[name] for p in parts]) for name in first.extra},
            texts,
        )


@dataclasses.dataclass(frozen=True)
class Segment:
    """Rows of ``n`` texts that come from one tokenizer, as a group of matrices takes them.

    Attributes:
        tokenizer: What made the ids; ``None`` where a row stands for a whole text.
        ids: Token ids ``(n, T)``, one for each row.
        rows: ``(n, T, width)``.
        attended: ``(n, T)``, 0 where the denoiser masks a row; ``None`` where it masks none.
    """

    tokenizer: Any
    ids: Tensor
    rows: Tensor
    attended: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class TextInput:
    """A group of matrices that all take the same rows of a text.

    Attributes:
        names: Canonical names of the matrices, each ``(out, width)``.
        width: Width of the rows.
        segments: Texts -> their rows; a pipeline that strings the rows of several text encoders
            together has one segment for each, in an order that is the same for all texts.
        field: Which tensor of a :class:`Condition` the rows are; ``None`` where the denoiser makes them.
    """

    names: tuple[str, ...]
    width: int
    segments: Callable[[Sequence[str]], Sequence[Segment]]
    field: Literal["embeddings", "pooled"] | None = "embeddings"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a denoiser said of ``n`` rows, typed, so that methods can ask for any form of it.

    With ``x_t = alpha x_0 + sigma epsilon``: ``v = alpha epsilon - sigma x_0`` and, for flow matching
    (``alpha = 1 - sigma``), ``flow = epsilon - x_0``.

    Attributes:
        kind: What ``value`` is.
        value: ``(n, channels, height, width)``.
        alpha, sigma: ``(n, 1, 1, 1)``.
    """

    kind: PredictionKind
    value: Tensor
    alpha: Tensor
    sigma: Tensor

    def x0(self, noised: Tensor) -> Tensor:
        """The predicted clean latents, given the ``x_t`` the prediction was made for."""
        if self.kind == "x0":
            return self.value
        if self.kind == "v":
            scale = self.alpha.square() + self.sigma.square()
            return (self.alpha * noised - self.sigma * self.value) / scale
        if self.kind == "flow":
            return (noised - self.sigma * self.value) / (self.alpha + self.sigma)
        return (noised - self.sigma * self.value) / self.alpha

    def epsilon(self, noised: Tensor) -> Tensor:
        """The predicted noise, given the ``x_t`` the prediction was made for."""
        # Never by way of x0 where there is a direct form: x_t - alpha x0 cancels in half precision.
        if self.kind == "epsilon":
            return self.value
        if self.kind == "v":
            scale = self.alpha.square() + self.sigma.square()
            return (self.sigma * noised + self.alpha * self.value) / scale
        if self.kind == "flow":
            return (noised + self.alpha * self.value) / (self.alpha + self.sigma)
        return (noised - self.alpha * self.value) / self.sigma

    def velocity(self, noised: Tensor) -> Tensor:
        """The predicted ``v``."""
        if self.kind == "v":
            return self.value
        scale = self.alpha.square() + self.sigma.square()
        if self.kind == "epsilon":
            return (scale * self.value - self.sigma * noised) / self.alpha
        if self.kind == "x0":
            return (self.alpha * noised - scale * self.value) / self.sigma
        difference = self.alpha - self.sigma
        return (difference * noised + scale * self.value) / (self.alpha + self.sigma)

    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        """What a perfect denoiser would have said of ``alpha clean + sigma noise``, in this kind."""
        if self.kind == "x0":
            return clean
        if self.kind == "v":
            return self.alpha * noise - self.sigma * clean
        return noise - clean if self.kind == "flow" else noise

    def replace(self, value: Tensor) -> Prediction:
        """The same kind of prediction with another value."""
        return dataclasses.replace(self, value=value)

    def select(self, index: Any) -> Prediction:
        """Rows by slice or index."""
        return Prediction(self.kind, self.value[index], self.alpha[index], self.sigma[index])

    def wide(self) -> Prediction:
        """In float32: where little of the picture is left, ``x_0`` is a small difference divided by a small number."""
        return Prediction(self.kind, self.value.float(), self.alpha.float(), self.sigma.float())

    def guided(self, unconditional: Prediction, guidance: Tensor) -> Prediction:
        """Classifier-free guidance ``u + g (c - u)`` with a guidance per row, ``(n, 1, 1, 1)``."""
        if self.kind != unconditional.kind:
            raise UnsupportedModel(
                f"a {self.kind} and a {unconditional.kind} prediction cannot be mixed"
            )
        return self.replace(unconditional.value + guidance * (self.value - unconditional.value))


@dataclasses.dataclass
class Context:
    """What a control may know of the running step.

    Attributes:
        step: Index of the sampling step, 0-based; -1 outside a sampling loop.
        steps: Number of sampling steps; 0 outside a sampling loop.
        timestep: ``(rows,)`` timesteps of the rows.
        condition: The rows' condition.
        rows: Number of rows.
        conditional: bool ``(rows,)``: rows of the conditional branch of guidance.
        negative: The user's text of the unconditional branch.
        guidance: Guidance of each picture ``(n,)``, ``n`` the rows of one branch; ``None`` outside a sampling loop.
        blank: Predictions of the unconditional branch count as nothing, as a published loss on guidance has it.
        further: Control -> predictions ``(n, ...)`` for the conditions its ``branches`` asked for, in their order.
        layer: Name of the layer that is running, for ``attention`` and ``activations``.
        inputs: What that layer was given, for ``activations``.
        ids, attended: Token ids ``(rows, tokens)`` that the running text encoder reads and, where the pipeline
            gives it one, their mask.
        changed: bool ``(rows,)``: a control returned other hidden states of a text encoder for the row; ``None``:
            for no row.
        memory: A place for controls to keep what lasts over the steps, keyed by control.
    """

    step: int = -1
    steps: int = 0
    timestep: Tensor | None = None
    condition: Condition | None = None
    rows: int = 0
    conditional: Tensor | None = None
    negative: str = ""
    guidance: Tensor | None = None
    blank: bool = False
    further: dict[Any, list[Prediction]] = dataclasses.field(default_factory=dict)
    layer: str = ""
    inputs: Sequence[Any] = ()
    ids: Tensor | None = None
    attended: Tensor | None = None
    changed: Tensor | None = None
    memory: dict[Any, Any] = dataclasses.field(default_factory=dict)
