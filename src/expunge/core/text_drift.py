"""How far an edit of the text encoders moves the rows of texts, in shares of their norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..models.diffusion import DiffusionModel

__all__ = ["TextDrift", "filled"]


def filled(templates: Sequence[str], names: Sequence[str]) -> list[str]:
    """Templates with names in the place of ``{}``, the shorter list beginning again; none without names."""
    count = max(len(names), len(templates)) if names else 0
    return [
        templates[i % len(templates)].replace("{}", names[i % len(names)]) for i in range(count)
    ]


class TextDrift:
    """Groups of texts, watched while text encoders train.

    Args:
        model: As it is before training.
        texts: Name of a group -> its texts; groups of nothing but empty texts are left out.

    Attributes:
        values: Name -> ``|| E_now - E_before || / || E_before ||`` of the group's rows, one for each :meth:`measure`.
    """

    def __init__(self, model: DiffusionModel, texts: Mapping[str, Sequence[str]]) -> None:
        self.model = model
        self.texts = {name: list(own) for name, own in texts.items() if any(own)}
        self.before = {name: self._rows(own) for name, own in self.texts.items()}
        self.values: dict[str, list[float]] = {name: [] for name in self.texts}

    @torch.no_grad()
    def _rows(self, texts: Sequence[str]) -> Tensor:
        return self.model.encode(texts).embeddings.float()

    def measure(self) -> None:
        """Add how far the rows are from where they began."""
        for name, texts in self.texts.items():
            moved = self._rows(texts) - self.before[name]
            self.values[name].append(float(moved.norm() / self.before[name].norm()))

    def state(self) -> dict[str, Tensor]:
        """The values, for checkpoints."""
        return {name: torch.tensor(own, dtype=torch.float64) for name, own in self.values.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state` gave."""
        self.values = {name: state[name].tolist() for name in self.texts}
