"""Control: what acts on a model while it runs; :mod:`expunge.method` re-exports it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

__all__ = ["Control"]


class Control:
    """An intervention while a model runs; override the hooks that are needed.

    The adapter calls the hooks of all controls in recorded order.  Each returns its (possibly changed) argument.
    ``context`` is the adapter's record of the running step: step index, timestep, rows, layer name, condition.

    Attributes:
        layers: Canonical names of the modules whose outputs ``activations`` is given.
        guides: It acts on guidance: what it does is seen only where both branches run.  ``None``: if it asks for
            further branches or changes predictions.
    """

    layers: Sequence[str] = ()
    guides: ClassVar[bool | None] = None

    HOOKS: ClassVar[tuple[str, ...]] = (
        "start", "sampler", "condition", "branches", "attention", "latents", "prediction",
        "activations", "logits", "next_input", "guest", "finish",
    )  # fmt: skip

    @classmethod
    def hooks(cls) -> frozenset[str]:
        """Names of the hooks this control overrides; the adapter installs only those."""
        return frozenset(
            hook for hook in cls.HOOKS if getattr(cls, hook) is not getattr(Control, hook)
        )

    @classmethod
    def on_guidance(cls) -> bool:
        """Whether it acts on guidance; see ``guides``."""
        return bool(cls.hooks() & {"branches", "prediction"}) if cls.guides is None else cls.guides

    def start(self, context: Any) -> None:
        """Before the first step."""

    def sampler(self, model: Any, steps: int, generators: Sequence[Any]) -> Any:
        """A walk in place of the scheduler's (see :class:`~expunge.models.samplers.Sampler`), or ``None``."""

    def condition(self, context: Any, condition: Any) -> Any:
        """The row-wise condition of this step."""
        return condition

    def branches(self, context: Any) -> Any:
        """Further conditions of the same pictures, asked for in the same pass; see ``context.further``."""

    def attention(self, context: Any, probabilities: Any) -> Any:
        """Attention probabilities ``(rows, heads, queries, keys)`` of ``context.layer``."""
        return probabilities

    def latents(self, context: Any, latents: Any) -> Any:
        """The noisy latents ``(rows, channels, height, width)`` before the prediction."""
        return latents

    def prediction(self, context: Any, prediction: Any) -> Any:
        """The typed prediction, conditional and unconditional rows still apart."""
        return prediction

    def activations(self, context: Any, hidden: Any) -> Any:
        """Hidden states of ``context.layer``, a row each; of a text encoder not for the unconditional branch."""
        return hidden

    def logits(self, context: Any, logits: Any) -> Any:
        """Next-token logits ``(rows, vocabulary)``."""
        return logits

    def next_input(self, context: Any, token_or_embedding: Any) -> Any:
        """What is fed back at the next position."""
        return token_or_embedding

    def guest(self, context: Any) -> Any:
        """A prediction of another model that takes part in this step, or ``None``."""
        return None

    def finish(self, context: Any, outputs: Any) -> Any:
        """The finished outputs."""
        return outputs
