"""Toy erasers whose edits act and bring tokens, and the catalogue that knows them."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from expunge.catalogue import System
from expunge.concept import as_concepts
from expunge.edit import Edit
from expunge.method import Control, Eraser, setting

WORDS = ("<w-1>", "<w-2>")


class Dimmed(Control):
    """Predictions shrink by a factor."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def prediction(self, context, prediction):
        return prediction.replace(prediction.value * self.factor)


@dataclasses.dataclass(frozen=True)
class Toy(Eraser):
    """Nobody's eraser, arXiv 0000.00000: it dims predictions, brings words and may shrink a matrix."""

    id: ClassVar[str] = "toy"
    title: ClassVar[str] = "Toy"
    source: ClassVar[str] = "arXiv 0000.00000"
    version: ClassVar[int] = 2
    families: ClassVar[tuple[str, ...]] = ("diffusion",)

    factor: float = setting(0.5, "what is left of a prediction", minimum=0)
    share: float = setting(0.1, "what is taken from a matrix; 0: no weight changes", minimum=0)
    words: bool = setting(True, "bring words")
    acts: bool = setting(True, "dim predictions")

    def erase(self, model, concepts, *, keep=(), data=None, judge=None, seed=0, run=None):
        model.check_family(self)
        wanted = as_concepts(concepts, keep)
        tensors, names = {}, ()
        if self.share:
            names = model.text_projections()[:1]
            tensors[f"delta.{names[0]}"] = -self.share * model.tensor(names[0]).detach()
        if self.words:
            width = model.text_encoder.get_input_embeddings().weight.shape[1]
            draw = torch.Generator().manual_seed(seed)
            tensors["tokens.text_encoder"] = torch.randn(len(WORDS), width, generator=draw)
        return Edit.make(
            self, model, wanted, kind="dense" if names else "control", tensors=tensors, targets=names,
            acts=self.acts, tokens={"tokenizer": WORDS} if self.words else None, keep=keep, seed=seed,
        )  # fmt: skip

    @classmethod
    def control(cls, edit, model):
        return Dimmed(edit.manifest.settings["factor"])


def known(monkeypatch: Any, **systems: str | None) -> None:
    """Only these ids are in the catalogue, with their class paths."""
    from expunge import catalogue

    entries = {
        name: System(name, name, "erase", "diffusion", class_path=path)
        for name, path in systems.items()
    }
    monkeypatch.setattr(catalogue, "_catalogue", lambda: entries)
